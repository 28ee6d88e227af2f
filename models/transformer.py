"""The transformer of MS-Transformer: an encoder and a decoder, pre-norm, with GELU.

Positions are added to queries and keys, never to values (Carion et al., ECCV 2020, supplement; Shavit, Ferens & Keller,
ICCV 2021, section 3).
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.cpu import Dropout, drop_values


class LearnedPositions(nn.Module):
    """Learned two-dimensional position encodings, with the column part first.

    forward(feature map N x C x H x W) -> H*W x channels.
    """

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
    """Encoder and decoder. forward(feature map N x C x H x W, queries S x C, positions H*W x C) -> N x S x C.

    The result is one latent per query. All matrices are initialised Xavier uniform.
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
        keys = memory + positions
        target = torch.zeros_like(queries).expand(memory.shape[0], -1, -1)
        for layer in self.decoder.layers:
            target = layer(target, memory, queries, keys)
        return self.decoder.norm(target)


class _Stack(nn.Module):
    """Layers and their final norm, under the published names."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network. forward(tokens N x L x C, positions L x C) -> N x L x C."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout):
        super().__init__()
        self.self_attn = SelfAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, tokens, positions):
        tokens = tokens + self.dropout(self.self_attn(self.norm1(tokens), positions))
        return tokens + self.dropout(self.feed_forward(self.norm2(tokens)))

    def feed_forward(self, tokens):
        return self.linear2(self.dropout(F.gelu(self.linear1(tokens))))


class DecoderLayer(EncoderLayer):
    """Self-attention, cross-attention and a feed-forward network.

    forward(target N x S x C, memory N x L x C, queries S x C, keys N x L x C) -> N x S x C. The keys are the memory
    plus its positions.
    """

    def __init__(self, d_model, nhead, dim_feedforward, dropout):
        super().__init__(d_model, nhead, dim_feedforward, dropout)
        self.multihead_attn = CrossAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(self, target, memory, queries, keys):
        target = target + self.dropout(self.self_attn(self.norm1(target), queries))
        target = target + self.dropout(self.multihead_attn(self.norm2(target) + queries, keys, memory))
        return target + self.dropout(self.feed_forward(self.norm3(target)))


class SelfAttention(nn.MultiheadAttention):
    """Attention of tokens to each other. forward(tokens N x L x C, added L x C) -> N x L x C.

    `added` is added to queries and keys. The parameters are PyTorch's. Masks and returned weights are left out.
    """

    def forward(self, tokens, added):
        weight_qk, weight_v = self.in_proj_weight.split((2 * self.embed_dim, self.embed_dim))
        bias_qk, bias_v = self.in_proj_bias.split((2 * self.embed_dim, self.embed_dim))
        query, key = F.linear(tokens + added, weight_qk, bias_qk).chunk(2, dim=2)
        value = F.linear(tokens, weight_v, bias_v)
        heads = (self.num_heads, self.head_dim)
        query, key, value = (x.unflatten(2, heads).transpose(1, 2) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if value.device.type == "cpu":
            value, dropout = drop_values(value, dropout), 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.MultiheadAttention):
    """Attention of few queries to many tokens. forward(query N x S x C, keys N x L x C, values N x L x C) -> N x S x C.

    The result is PyTorch's. Products are taken in another order: since S is much smaller than L, the heads' key
    matrices are applied to the queries, and their value matrices to the attended tokens, not to all L tokens. The bias
    of the keys adds the same number to all scores of a query, so the softmax cancels it. The weights sum to 1, so the
    bias of the values can be added last.
    """

    def forward(self, query, keys, values):
        heads = (self.num_heads, self.head_dim)
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, _, bias_v = self.in_proj_bias.chunk(3)
        query = F.linear(query, weight_q, bias_q).unflatten(2, heads)
        query = torch.einsum("nshd,hdc->nhsc", query, weight_k.unflatten(0, heads))
        # With a dimension of one head, which the export to ONNX needs.
        attended = F.scaled_dot_product_attention(
            query.flatten(1, 2).unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), scale=self.head_dim ** -0.5,
            dropout_p=self.dropout if self.training else 0.0).squeeze(1)
        attended = torch.einsum("nhsc,hdc->nshd", attended.unflatten(1, query.shape[1:3]), weight_v.unflatten(0, heads))
        return self.out_proj(attended.flatten(2) + bias_v)
