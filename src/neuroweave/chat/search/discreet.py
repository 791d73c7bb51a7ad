"""A provider for those who may ask, but not know where the documents lie."""

from __future__ import annotations

from dataclasses import dataclass

from neuroweave.chat.search.local import LocalFolder
from neuroweave.chat.search.sources import Provider, SearchError, Source
from neuroweave.user_cache import user_cache


@dataclass(frozen=True)
class DiscreetProvider:
    """`provider`, whose name and errors tell of a folder its name alone."""

    provider: Provider

    @property
    def name(self) -> str:
        return f"local:{self.provider.folder.name}" if isinstance(self.provider, LocalFolder) else self.provider.name

    def search(self, query: str, *, count: int) -> list[Source]:
        try:
            return self.provider.search(query, count=count)
        except SearchError as error:
            raise SearchError(self._without_folders(str(error))) from error

    def _without_folders(self, text: str) -> str:
        if not isinstance(self.provider, LocalFolder):
            return text
        folder = self.provider.folder
        return text.replace(str(folder), folder.name or "/").replace(str(user_cache()), "...")
