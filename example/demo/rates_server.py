"""A real HTTP server on this machine that refuses exactly one request in four."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CURRENCIES = (
    "AUD BGN BRL CAD CHF CNY CZK DKK GBP HUF INR JPY KRW MXN NOK PLN SEK TRY USD ZAR"
)
RATES = {
    currency: f"{1 + number / 8:.4f}"
    for number, currency in enumerate(CURRENCIES.split())
}


class RatesServer(ThreadingHTTPServer):
    """Serves while its `with` block runs; remembers what it was asked and refused."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.lock = threading.Lock()
        self.requests = 0
        self.refused: list[str] = []

    def __enter__(self) -> "RatesServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def refuses(self, currency: str) -> bool:
        with self.lock:
            self.requests += 1
            if self.requests % 4:
                return False
            self.refused.append(currency)
            return True


class Handler(BaseHTTPRequestHandler):
    server: RatesServer

    def do_GET(self) -> None:
        currency = self.path.strip("/")
        if self.server.refuses(currency):
            self.send_error(503)
            return
        body = json.dumps({"per_euro": RATES[currency]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet: the demo's output is the progress bar's."""
