"""The user's code runs here: listened to in a run, or run aside so that it leaves no trace."""

__all__: list[str] = []
