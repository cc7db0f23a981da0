"""A page in a real browser: what it shows and what it asks for."""

import functools
import json
import subprocess
import threading
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WRAPPER = """<!doctype html><body><script>
addEventListener("load", async () => {
  const found = {};
  for (const width of WIDTHS) {
    const frame = document.createElement("iframe");
    frame.style = `width: ${width}px; height: 900px; border: 0`;
    frame.src = "PAGE";
    const loaded = new Promise(resolve => frame.onload = resolve);
    document.body.append(frame);
    await loaded;
    const page = frame.contentDocument;
    found[width] = {
      figures: [...page.querySelectorAll("figure svg")].map(svg => [svg.getBBox().width, svg.getBoundingClientRect().width]),
      ink: getComputedStyle(page.body).color,
      words: [...page.querySelectorAll("figure text, figure [id^=text_] g")].map(words => getComputedStyle(words).fill),
      paper: getComputedStyle(page.body).backgroundColor,
      text: page.body.innerText,
      hidden: [...page.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth),
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      asked: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    };
  }
  document.body.innerHTML = "";
  const answer = document.createElement("pre");
  answer.textContent = JSON.stringify(found);
  document.body.append(answer);
});
</script></body>"""


def look_at(
    page: Path, widths: list[int], chromium: str, scratch: Path, *, dark: bool = False
) -> tuple[dict, list[str]]:
    """What headless Chromium shows of a page at some widths in px, and the paths that it requested from the server."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    wrapper = WRAPPER.replace("WIDTHS", str(widths)).replace("PAGE", page.name)
    (page.parent / "wrapper.html").write_text(wrapper)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(page.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shown = subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={scratch}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/wrapper.html",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
        (page.parent / "wrapper.html").unlink()
    return json.loads(unescape(shown.split("<pre>")[1].split("</pre>")[0])), asked
