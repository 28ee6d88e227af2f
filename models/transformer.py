"""The encoder-decoder of MS-Transformer: pre-norm, GELU, with positions added to queries and keys but never to values
(Carion et al., ECCV 2020, supplement; Shavit, Ferens & Keller, ICCV 2021, section 3)."""
import torch
import torch.nn.functional as F
from torch import nn


class LearnedPositions(nn.Module):
    """Learned two-dimensional positions: feature map N x C x H x W -> H*W x channels, the column part first."""

    def __init__(self, channels, size=50):
        super().__init__()
        self.row_embed = nn.Embedding(size, channels // 2)
        self.col_embed = nn.Embedding(size, channels // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, feature_map):
        height, width = feature_map.shape[-2:]
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height].unsqueeze(1).expand(-1, width, -1)
        return torch.cat((columns, rows), dim=-1).flatten(0, 1)


class Transformer(nn.Module):
    """forward(feature map N x C x H x W, queries S x C, positions H*W x C) -> N x S x C, a latent a query.

    Xavier uniform initialisation of every matrix.
    """

    def __init__(self, d_model, nhead, n_encoder_layers, n_decoder_layers, dim_feedforward, dropout):
        super().__init__()
        args = (d_model, nhead, dim_feedforward, dropout)
        self.encoder = _Stack(EncoderLayer(*args) for _ in range(n_encoder_layers))
        self.decoder = _Stack(DecoderLayer(*args) for _ in range(n_decoder_layers))
        self.encoder.norm, self.decoder.norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, feature_map, queries, positions):
        memory = feature_map.flatten(2).transpose(1, 2)
        for layer in self.encoder.layers:
            memory = layer(memory, positions)
        memory = self.encoder.norm(memory)
        target = torch.zeros_like(queries).expand(len(memory), -1, -1)
        for layer in self.decoder.layers:
            target = layer(target, memory, queries, positions)
        return self.decoder.norm(target)


class _Stack(nn.Module):
    """Holds layers and their final norm under the published names."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class EncoderLayer(nn.Module):
    """forward(tokens N x L x C, positions L x C) -> N x L x C."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, positions):
        value = self.norm1(tokens)
        query = value + positions
        tokens = tokens + self.dropout(_attend(self.self_attn, query, query, value))
        return tokens + self.dropout(self.feed_forward(self.norm2(tokens)))

    def feed_forward(self, tokens):
        return self.linear2(self.dropout(F.gelu(self.linear1(tokens))))


class DecoderLayer(EncoderLayer):
    """forward(target N x S x C, memory N x L x C, queries S x C, positions L x C) -> N x S x C."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout):
        super().__init__(d_model, nhead, dim_feedforward, dropout)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(self, target, memory, queries, positions):
        value = self.norm1(target)
        query = value + queries
        target = target + self.dropout(_attend(self.self_attn, query, query, value))
        query = self.norm2(target) + queries
        target = target + self.dropout(_attend(self.multihead_attn, query, memory + positions, memory))
        return target + self.dropout(self.feed_forward(self.norm3(target)))


def _attend(attention, query, key, value):
    return attention(query, key, value, need_weights=False)[0]
