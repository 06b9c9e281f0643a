"""What a page looks like in a browser: what is too faint to read, which colours a picture has."""

from __future__ import annotations

import base64
from pathlib import Path

# Texts whose contrast (WCAG 2.1) with the nearest background is below 4.5.
FAINT = """(() => {
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(n => n / 255)
      .map(n => n <= 0.03928 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
  const behind = one => { for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor; if (!/, 0\\)$/.test(color)) return color; }
    return 'rgb(255, 255, 255)'; };
  const faint = [];
  const texts = 'h1, h2, h3, h4, p, li, a, b, small, label, button, dt, dd, td, th, summary, figcaption, text';
  for (const one of document.querySelectorAll(texts)) {
    if (!one.getClientRects().length) continue;
    const style = getComputedStyle(one);
    const [a, b] = [light(one.tagName === 'text' ? style.fill : style.color), light(behind(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${one.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return [...new Set(faint)];
})()"""


def colors_of(picture: Path, context):
    """The colours of a PNG, which the browser reads for us."""
    source = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    blank = context.new_page()
    try:
        return blank.evaluate(
            """async source => { const image = new Image(); image.src = source; await image.decode();
            const canvas = document.createElement('canvas'); canvas.width = image.width; canvas.height = image.height;
            const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, image.width, image.height).data, found = new Set();
            for (let n = 0; n < data.length; n += 4) found.add(data[n] * 65536 + data[n + 1] * 256 + data[n + 2]);
            return [...found]; }""",
            source,
        )
    finally:
        blank.close()
