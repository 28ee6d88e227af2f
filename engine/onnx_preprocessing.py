"""The test transform as an ONNX graph: frames of any size -> normalised crops, equal to Pillow's bit for bit.

ONNX's own antialiased Resize computes in float32, which turns Pillow's ties. A pixel in a few hundred then differs by
one level, and that moves the poses of a trained network by millimetres.

Pillow resizes the columns, rounds to 8 bits, then resizes the rows. Weights are whole numbers of 22 bits. Here they are
three bytes, whose products with 8-bit pixels are exact and fast (MatMulInteger). Only the crop is computed.
"""
from datasets import transforms
from datasets.image_cache import SHORTER_SIDE

_GRAPH = """<ir_version: {ir_version}, opset_import: ["": {opset}]>
preprocessing (uint8[N, H, W, 3] frames) => (float[N, 3, {size}, {size}] normalised)
<int64[1] shorter_side = {{{shorter_side}}}, int64 crop = {{{size}}}, int64[2] of_pixels = {{2, 3}}, int64 zero = {{0}},
 int64 one = {{1}}, double none_d = {{0.0}}, double one_d = {{1.0}}, double half_d = {{0.5}}, float half = {{0.5}},
 double unit = {{4194304.0}}, int64 byte = {{256}}, int32 byte_i = {{256}}, int32 half_unit = {{2097152}},
 int32 unit_i = {{4194304}}, int64[1] first = {{0}}, int64[1] second = {{1}}, float[1, 3, 1, 1] mean = {{{mean}}},
 float[1, 3, 1, 1] deviation = {{{deviation}}}>
{{
  planes = Transpose <perm = [0, 3, 1, 2]> (frames)
  shape = Shape (planes)
  stored = Gather (shape, of_pixels)
  shorter = ReduceMin (stored)
  times_side = Mul (stored, shorter_side)
  wanted = Div (times_side, shorter)
  margins = Sub (wanted, crop)
  margins_f = Cast <to = 1> (margins)
  halves = Mul (margins_f, half)
  rounded = Round (halves)
  begin = Cast <to = 7> (rounded)
  in_crop = Range (zero, crop, one)
  {columns}
  {apply_columns}
  {rows}
  {apply_rows}
  levels = Cast <to = 1> (rows_resized)
  centred = Sub (levels, mean)
  normalised = Div (centred, deviation)
}}"""
# The weights of an axis: input pixels x output pixels, as Pillow's precompute_coeffs for the triangle filter.
_WEIGHTS = """
  {axis}_in = Gather (stored, {which})
  {axis}_out = Gather (wanted, {which})
  {axis}_begin = Gather (begin, {which})
  {axis}_in_d = Cast <to = 11> ({axis}_in)
  {axis}_out_d = Cast <to = 11> ({axis}_out)
  {axis}_scale = Div ({axis}_in_d, {axis}_out_d)
  {axis}_support = Max ({axis}_scale, one_d)
  {axis}_narrow = Div (one_d, {axis}_support)
  {axis}_j = Add (in_crop, {axis}_begin)
  {axis}_j_d = Cast <to = 11> ({axis}_j)
  {axis}_middle = Add ({axis}_j_d, half_d)
  {axis}_centres = Mul ({axis}_middle, {axis}_scale)
  {axis}_stop = Squeeze ({axis}_in, first)
  {axis}_i = Range (zero, {axis}_stop, one)
  {axis}_i_d = Cast <to = 11> ({axis}_i)
  {axis}_i_column = Unsqueeze ({axis}_i_d, second)
  {axis}_from = Sub ({axis}_i_column, {axis}_centres)
  {axis}_offset = Add ({axis}_from, half_d)
  {axis}_x = Mul ({axis}_offset, {axis}_narrow)
  {axis}_distance = Abs ({axis}_x)
  {axis}_triangle = Sub (one_d, {axis}_distance)
  {axis}_filter = Max ({axis}_triangle, none_d)
  {axis}_sum = ReduceSum <keepdims = 1> ({axis}_filter, first)
  {axis}_share = Div ({axis}_filter, {axis}_sum)
  {axis}_units = Mul ({axis}_share, unit)
  {axis}_up = Add ({axis}_units, half_d)
  {axis}_whole_any = Cast <to = 7> ({axis}_up)
  {axis}_whole = {orient} ({axis}_whole_any)
  {axis}_low = Mod ({axis}_whole, byte)
  {axis}_rest = Div ({axis}_whole, byte)
  {axis}_middle_byte = Mod ({axis}_rest, byte)
  {axis}_high = Div ({axis}_rest, byte)
  {axis}_0 = Cast <to = 2> ({axis}_low)
  {axis}_1 = Cast <to = 2> ({axis}_middle_byte)
  {axis}_2 = Cast <to = 2> ({axis}_high)"""
# The products with pixels: high byte first, then rounded to 8 bits.
_APPLY = """
  {axis}_p0 = MatMulInteger ({left0}, {right0})
  {axis}_p1 = MatMulInteger ({left1}, {right1})
  {axis}_p2 = MatMulInteger ({left2}, {right2})
  {axis}_p2_up = Mul ({axis}_p2, byte_i)
  {axis}_p21 = Add ({axis}_p2_up, {axis}_p1)
  {axis}_p21_up = Mul ({axis}_p21, byte_i)
  {axis}_p = Add ({axis}_p21_up, {axis}_p0)
  {axis}_p_up = Add ({axis}_p, half_unit)
  {axis}_levels = Div ({axis}_p_up, unit_i)
  {axis}_resized = Cast <to = 2> ({axis}_levels)"""


def preprocessing(ir_version, opset):
    """An ONNX model from 'frames', N x H x W x 3 uint8, to 'normalised', N x 3 x 224 x 224."""
    import onnx

    columns = {f"{side}{k}": f"columns_{k}" if side == "right" else "planes" for side in ("left", "right")
               for k in range(3)}
    rows = {f"{side}{k}": f"rows_{k}" if side == "left" else "columns_resized" for side in ("left", "right")
            for k in range(3)}
    mean, deviation = (", ".join(str(255 * value) for value in values) for values in transforms.IMAGENET)
    return onnx.parser.parse_model(_GRAPH.format(
        ir_version=ir_version, opset=opset, size=transforms.SIZE, shorter_side=SHORTER_SIDE, mean=mean,
        deviation=deviation, columns=_WEIGHTS.format(axis="columns", which="second", orient="Identity"),
        rows=_WEIGHTS.format(axis="rows", which="first", orient="Transpose <perm = [1, 0]>"),
        apply_columns=_APPLY.format(axis="columns", **columns), apply_rows=_APPLY.format(axis="rows", **rows)))
