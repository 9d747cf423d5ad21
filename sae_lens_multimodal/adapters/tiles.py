"""Pictures that are stretched to whole square tiles, cut apart, and followed by the whole picture in one tile."""

from __future__ import annotations

from typing import NamedTuple

from sae_lens_multimodal.adapters.family import ImageTokens
from sae_lens_multimodal.adapters.grid import before_resize, boxes_of, grid_edges, join_views, patches_of_view


class Tile(NamedTuple):
    """A square tile, whose patches are merged to square blocks, one for each token."""

    size: int
    """Side in pixels."""
    tokens: int
    """Tokens along one side; what their blocks of patches leave over is seen by no token."""
    block: int
    """Side of a token's block of patches in pixels."""

    def of_picture(self, width: int, height: int, rows: int, columns: int) -> ImageTokens:
        """Return the tokens of a picture: tile by tile and row by row, then the whole; of the whole alone if 1 x 1."""
        tiles = [
            self._view(width, height, (row, rows), (column, columns), 1 + row * columns + column)
            for row in range(rows)
            for column in range(columns)
            if rows * columns > 1
        ]
        return join_views(*tiles, self._view(width, height, (0, 1), (0, 1), 0))

    def _view(self, width: int, height: int, row: tuple[int, int], column: tuple[int, int], number: int) -> ImageTokens:
        """Return the tokens of a tile, given the number of its row and how many there are, and likewise its column."""
        edges = grid_edges(self.tokens, self.block)
        y = before_resize(edges + row[0] * self.size, height, row[1] * self.size)
        x = before_resize(edges + column[0] * self.size, width, column[1] * self.size)
        return patches_of_view(boxes_of(y, x, width, height).reshape(-1, 4), number)
