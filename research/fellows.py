"""What a rank knows of the others while they train together: who they are, who has left, who is silent, who speaks for all."""

import threading
from pathlib import Path
from typing import Protocol

from research.peers import Neighbours, Peer, everyone
from research.progress import Progress
from research.run_folder import RunFolder
from research.sign_of_life import Sign, Signs


class Others(Protocol):
    """The other ranks, as far as they are known."""

    def lost(self) -> dict[int, Sign]:
        """Ranks that have left before the end, and their last signs."""
        ...

    def silent(self, seconds: float) -> set[int]:
        """Ranks without a sign of life for so long."""
        ...


class Strangers:
    """The others before they have met."""

    def lost(self) -> dict[int, Sign]:
        """Nobody is known, nobody missed."""
        return {}

    def silent(self, seconds: float) -> set[int]:
        """Nobody is heard."""
        return set()


class Fellows:
    """The others once all have met. Its methods are called by several threads."""

    def __init__(self, folder: RunFolder, rank: int, world: int, root: Path, progress: Progress) -> None:
        """Collective."""
        self.folder, self.rank, self._progress = folder, rank, progress
        self._main = threading.main_thread().ident or 0
        self.signs = Signs(folder, rank, world, root)
        self.signs.give(self.own())  # before any other rank may look for it
        self.peers: list[Peer] = everyone(rank, world)
        if rank == 0:
            self.signs.forget_others()
        self.neighbours = Neighbours(self.peers, rank)
        self._gives = True

    def own(self) -> Sign:
        """This rank as it is now."""
        return self.signs.own(self._progress, self._main)

    def listen(self, seconds: float, closely: bool) -> None:
        """Leave a sign of life; `closely`: and read those of the others. `seconds` have passed since the last time."""
        self._gives = self.signs.give(self.own())
        if closely:
            self.signs.listen(seconds)
        else:
            self.signs.rest()

    def lost(self) -> dict[int, Sign]:
        """Ranks that have left before the end, and their last signs: one that ends as it should takes its sign away first."""
        said = {rank: sign for rank, sign in self.signs.heard.items() if sign.left}
        return said | {rank: sign for rank in self.neighbours.gone() if (sign := self.signs.read(rank))}

    def silent(self, seconds: float) -> set[int]:
        """Ranks without a sign of life for so long; none where this one's signs are refused, too: then it is the file system."""
        return {rank for rank, silence in self.signs.silence.items() if silence >= seconds} if self._gives else set()

    def speaks(self, mute: set[int]) -> bool:
        """One rank speaks for all: the first that can."""
        return self.rank == min({peer.rank for peer in self.peers} - mute, default=self.rank)
