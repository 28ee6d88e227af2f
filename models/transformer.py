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
        keys = memory + positions
        target = torch.zeros_like(queries).expand(len(memory), -1, -1)
        for layer in self.decoder.layers:
            target = layer(target, memory, queries, keys)
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
    """forward(target N x S x C, memory N x L x C, queries S x C, keys N x L x C) -> N x S x C; the keys are the memory with
    its positions."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout):
        super().__init__(d_model, nhead, dim_feedforward, dropout)
        self.multihead_attn = CrossAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(self, target, memory, queries, keys):
        target = target + self.dropout(self.self_attn(self.norm1(target), queries))
        target = target + self.dropout(self.multihead_attn(self.norm2(target) + queries, keys, memory))
        return target + self.dropout(self.feed_forward(self.norm3(target)))


class SelfAttention(nn.MultiheadAttention):
    """forward(tokens N x L x C, added L x C) -> N x L x C: the tokens' attention to each other, with `added` on queries and
    keys. PyTorch's parameters, without its masks and weights."""

    def forward(self, tokens, added):
        weight_qk, weight_v = self.in_proj_weight.split((2 * self.embed_dim, self.embed_dim))
        bias_qk, bias_v = self.in_proj_bias.split((2 * self.embed_dim, self.embed_dim))
        query, key = F.linear(tokens + added, weight_qk, bias_qk).chunk(2, dim=2)
        value = F.linear(tokens, weight_v, bias_v)
        query, key, value = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if dropout and value.device.type == "cpu":
            # Dropping single weights would need all of them at once, 784 x 784 a head, which takes a CPU five times as long
            # as the attention itself. Dropping values instead has the same distribution for every query, only that the
            # queries of a head drop the same tokens.
            value = value * F.dropout(value.new_ones(value.shape[:3]), dropout).unsqueeze(3)
            dropout = 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.MultiheadAttention):
    """forward(query N x S x C, keys N x L x C, values N x L x C) -> N x S x C: the attention of a few queries to many tokens.

    The same numbers as PyTorch's, multiplied in another order: since S is a handful, the heads' key matrices are applied to
    the queries and the value matrices to what was attended to, not to L tokens. The keys' bias adds the same to all
    scores of a query and drops out of the softmax; the weights sum to one, so that the values' bias can be added afterwards.
    """

    def forward(self, query, keys, values):
        heads = (self.num_heads, self.head_dim)
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, _, bias_v = self.in_proj_bias.chunk(3)
        query = F.linear(query, weight_q, bias_q).unflatten(2, heads)
        query = torch.einsum("nshd,hdc->nhsc", query, weight_k.unflatten(0, heads))
        attended = F.scaled_dot_product_attention(query.flatten(1, 2), keys, values, scale=self.head_dim ** -0.5,
                                                  dropout_p=self.dropout if self.training else 0.0)
        attended = torch.einsum("nhsc,hdc->nshd", attended.unflatten(1, query.shape[1:3]), weight_v.unflatten(0, heads))
        return self.out_proj(attended.flatten(2) + bias_v)


class Dropout(nn.Dropout):
    """Dropout, on a CPU in a third of the time: 16 random bits an element rather than a random number."""

    def forward(self, x):
        if not (self.training and self.p) or x.device.type != "cpu":
            return super().forward(x)
        n_dropped = min(round(self.p * 2 ** 16), 2 ** 16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        keep = (bits[:x.numel()].view(x.shape) >= n_dropped - 2 ** 15).to(x.dtype)
        return x * keep.mul_(1 / (1 - n_dropped / 2 ** 16))
