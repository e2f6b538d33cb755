"""Transformer blocks over the pixels of a feature map.

Attention goes through `scaled_dot_product_attention`, which picks a kernel that never stores the
`N x N` weights where the device has one. Explicit attention over the 16,384 tokens of a 128x128 map
would take 8.6 GB per block and image with 8 heads. On a CPU that kernel serves inference and
training without dropout; with dropout, training falls back to the explicit form.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["PixelTransformer", "SelfAttention", "TransformerBlock"]


class SelfAttention(nn.Module):
    """Attend from every token to every token with several heads.

    Args:
        dim: channels of a token.
        heads: number of heads; divides `dim`.
        dropout: probability of dropping an attention weight, and an output value.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigurationError(
                f"transformer_heads must divide the {dim} channels it works on, got {heads!r}"
            )
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return attended tokens `(B, N, dim)` of `tokens`, same shape."""
        # (B, N, 3, heads, head_dim) -> three of (B, heads, N, head_dim)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0
        )
        projected: Tensor = self.proj_dropout(self.proj(attended.transpose(1, 2).flatten(2)))
        return projected


class TransformerBlock(nn.Module):
    """Add attention, then a two-layer perceptron, each on normalised tokens.

    Args:
        dim: channels of a token.
        heads: number of heads; divides `dim`.
        mlp_ratio: hidden width of the perceptron in units of `dim`.
        dropout: probability for attention weights and for the outputs of every linear layer.
    """

    def __init__(
        self, dim: int, heads: int = 8, mlp_ratio: float = 4.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ConfigurationError(f"transformer_mlp_ratio must be positive, got {mlp_ratio!r}")
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"transformer_dropout must be in [0, 1), got {dropout!r}")
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `(B, N, dim)` of `tokens`, same shape."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        result: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return result


class PixelTransformer(nn.Module):
    """Run transformer blocks over the pixels of a feature map.

    There is no positional code: the convolutions around it carry position, and the network stays
    free of any input size.

    Args:
        dim: channels of the feature map.
        depth: number of blocks.
        heads: number of heads; divides `dim`.
        mlp_ratio: hidden width of each perceptron in units of `dim`.
        dropout: dropout probability inside the blocks.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigurationError(
                f"transformer_depth must be at least 1, got {depth!r}; without transformer blocks "
                "use UNet or RoiNet"
            )
        self.blocks = nn.Sequential(
            *(TransformerBlock(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return features `(B, dim, H, W)`, in the memory format of `features`."""
        # The residual sums inside the blocks keep the strides of `features`, so no copy is made.
        tokens = self.blocks(features.flatten(2).transpose(1, 2))
        result: Tensor = tokens.transpose(1, 2).unflatten(2, features.shape[-2:])
        return result
