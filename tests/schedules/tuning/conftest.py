"""The database's fixtures, for both of its homes."""

from tests.schedules.database.conftest import database, server, url

__all__ = ["database", "server", "url"]
