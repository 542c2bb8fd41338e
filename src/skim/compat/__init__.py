"""The call signatures and layouts of other libraries' kernels, over Skim's operators: swap an import and compare.

`skim.compat.flash_mla` stands in for FlashMLA's `flash_mla`, `skim.compat.deep_gemm` for the index scores of DeepGEMM's
`deep_gemm`. They run wherever Skim does; `impl`, which the originals don't have, names an implementation.
"""
