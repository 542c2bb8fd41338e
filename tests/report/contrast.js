// The weakest contrast of text with what lies under it, after WCAG 2.2: {ratio, where}.
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  function rgba(colour) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  }

  function luminance(colour) {
    const [r, g, b] = colour.slice(0, 3).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  /** The colour under an element's text: those of its ancestors and its own, one painted over the other. */
  function ground(element) {
    const under = element.parentElement ? ground(element.parentElement) : [255, 255, 255];
    const [r, g, b, a] = rgba(getComputedStyle(element).backgroundColor);
    return [r, g, b].map((c, i) => c * (a / 255) + under[i] * (1 - a / 255));
  }

  let weakest = { ratio: 21, where: "" };
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!hasText || !element.getClientRects().length || element.closest("script, svg")) continue;
    const [light, dark] = [luminance(rgba(getComputedStyle(element).color)), luminance(ground(element))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < weakest.ratio) weakest = { ratio, where: `${element.tagName} ${element.className} ${element.textContent.slice(0, 40)}` };
  }
  return weakest;
}
