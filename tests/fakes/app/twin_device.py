"""The board's TwinClient with nobody behind it: what is desired is handed over by `desire`."""

made = []


class TwinClient:
    def __init__(self, text, options):
        self.text = text
        self.options = options
        self.reports = []
        made.append(self)

    @classmethod
    def from_connection_string(cls, text, **options):
        return cls(text, options)

    def on_desired(self, handler):
        self.desire = handler
        return handler

    def on_error(self, handler):
        return handler

    def on_state(self, handler):
        return handler

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_error):
        pass

    async def report(self, patch, wait=True):
        self.reports.append(patch)
