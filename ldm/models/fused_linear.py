"""A linear layer of several maps."""

from torch import nn


class FusedLinear(nn.Linear):
    """`parts` linear maps of one input in one layer; its output is theirs, one after another.

    optimizer=muon treats each of them as a matrix of its own.
    """

    def __init__(
        self, in_features: int, out_features: int, *, parts: int, bias: bool = True
    ) -> None:
        super().__init__(in_features, parts * out_features, bias=bias)
        self.parts = parts
