// Flash attention forward on tiles. What a bias along the diagonal and a run of keys a row describe is done here, 32
// rows by 64 keys at a time; every other call takes the general path of ../forward.h, with its products on tiles.
//
// Rows are measured by a reference, a whole power of two, instead of by their running maximum: it is the maximum of
// the first keys that a row meets and rises only where weights outgrow it by far. So a panel passes once through the
// registers, from products to weights, and nothing is scaled but in the rare panel that raises a reference. Keys pass
// from the last to the first: with a bias that decays, what comes first is what weighs most.
#pragma once

#include "../forward.h"
#include "packed.h"

namespace posattn::POSATTN_ISA {

constexpr int64_t GROUP_BLOCKS = 2, GROUP_ROWS = GROUP_BLOCKS * ROWS;
// Weights are kept for so many keys before they meet V: a longer sum for each of C's tiles, all of it in L1.
constexpr int64_t CHUNK_KEYS = 256;
// Where sums of weights, by lane over a group's rows, make references rise: far above what rows of like logits add up
// to, far below overflow.
constexpr float SUM_LIMIT = 16777216.0F;
// References beyond this leave the fast path: float32 would round them, and NaN has none.
constexpr float REFERENCE_LIMIT = 4194304.0F;

template <class M>
struct TileForwardScratch {
  int64_t q_stride, v_stride;
  float *q, *out;
  float *scores[2], *pairs;  // blocks' products [ROWS][NR]; a group's weights, [CHUNK_KEYS / 32][parts][GROUP_ROWS]
  float *sums[2], *references, *slopes, *intercepts;
  BiasTile bias;

  TileForwardScratch(Arena& arena, const Problem& p, int64_t rows)
      : q_stride(round_up(p.head_dim, TILE_DEPTH) / 2), v_stride(round_up(p.value_dim, TILE)) {
    q = arena.floats(M::parts * rows * q_stride);
    out = arena.floats(rows * v_stride);
    for (float*& x : scores) x = arena.floats(ROWS * NR);
    pairs = arena.floats(M::parts * GROUP_ROWS * CHUNK_KEYS / 2);
    for (float*& s : sums) s = arena.floats(rows * VL);
    references = arena.floats(rows);
    slopes = arena.floats(p.bias.n_knots + 1);
    intercepts = arena.floats(p.bias.n_knots + 1);
    bias.layout(arena, p.bias, rows, p.max_k_len);
    bias.block_rows = ROWS;
  }
};

// A product in units of log2, without a bias.
struct Scaled {
  vf times;
  POSATTN_INLINE vf operator()(int, int, vf x) const { return x * times; }
};

// The operands along the diagonal in units of log2; segments [n_knots + 1] as copies. An entry of -inf becomes a number
// that weighs as little.
inline void change_base(const BiasTile& bias, float* slopes, float* intercepts) {
  for (int64_t x = 0; bias.bias->relative() && x < bias.length; ++x)
    bias.relative[x] = (bias.relative[x] < FLOOR ? FLOOR : bias.relative[x]) * LOG2E;
  for (int64_t m = 0; bias.bias->psi && m <= bias.bias->n_knots; ++m) {
    slopes[m] = bias.segment_slope()[m] * LOG2E;
    intercepts[m] = bias.segment_intercept()[m] * LOG2E;
  }
}

// What products of mode M are still to be multiplied with to be logits in units of log2: parts of queries that carry
// the factor already are exact, and bfloat16 queries would be rounded by it.
template <class M>
inline float left_to_scale(float scale) {
  return M::parts == 1 ? scale * LOG2E : 1.0F;
}

// use(finish) with what finishes a product (times `mul`) over the panel of keys from j on and the ROWS rows from i on.
template <class Use>
bool with_diagonal_bias(const BiasTile& bias, const float* slopes, const float* intercepts, float mul, int64_t i,
                        int64_t j, const Use& use) {
  const Bias& b = *bias.bias;
  const vf times = set1(mul);
  if (b.relative()) return use(RelativeBias{bias.relative_row(i, j, NR), times});
  if (b.decay_k) {
    alignas(64) float columns[NR], rows[ROWS];
    const float* natural = bias.decay_columns(i, j, NR);
    for (int64_t c = 0; c < NR; c += VL) store(columns + c, load(natural + c) * LOG2E);
    bias.decay_rows(rows, i, ROWS);
    scale_row(rows, LOG2E, ROWS);
    return use(DecayBias{columns, rows, times});
  }
  if (!b.psi) return use(Scaled{times});
  const float* psi = bias.psi_row(i, j, NR);
  const auto [first, last] = bias.find_reaches(psi, i, j, NR)[0];
  const float* scales = bias.scales + (i - bias.area.i0);
  float steep[ROWS];
  for (int64_t r = 0; r < ROWS; ++r) steep[r] = slopes[first] * scales[r];
  const SegmentBias before{psi, steep, times, set1(intercepts[first])};
  if (first == last) return use(before);
  return use(KnotBias{before, scales, b.knots + first, slopes + first + 1, intercepts + first + 1, last - first});
}

// The keys of a panel that a row may see, a bit each.
inline uint64_t panel_bits(Interval keys, int64_t j) {
  const int64_t lo = iclamp(keys.lo - j, 0, NR), hi = iclamp(keys.hi - j, 0, NR);
  if (lo >= hi) return 0;
  const uint64_t below = hi == 64 ? ~uint64_t{0} : (uint64_t{1} << hi) - 1;
  return below & ~((uint64_t{1} << lo) - 1);
}

// The same of row i with the boolean mask, if it counts.
inline uint64_t visible_bits(const Problem& p, const Sequence& s, int64_t h, int64_t i, int64_t j, bool boolean) {
  const uint64_t bits = panel_bits(allowed(p, s, i), j);
  if (!boolean || bits == 0) return bits;
  const uint8_t* bytes = boolean_row(p, s, h, i, j);
  if (p.boolean_key == 0) return *bytes ? bits : 0;
  if (p.boolean_key == 1) {
    const __m512i shown = _mm512_maskz_loadu_epi8(bits, bytes);
    return _mm512_test_epi8_mask(shown, shown);
  }
  uint64_t visible = 0;
  for (int64_t c = 0; c < NR; ++c)
    if ((bits >> c & 1) && bytes[c * p.boolean_key]) visible |= uint64_t{1} << c;
  return visible;
}

// Whether anything of a panel of keys is hidden from rows i .. i + count - 1, or rows are missing from the block; then
// `bits` [ROWS] say what each may see. `seen` is what the boolean mask shows.
inline bool panel_mask(const Problem& p, const Sequence& s, int64_t h, int64_t i, int64_t count, int64_t j, Shown seen,
                       uint64_t* bits) {
  const Interval first = allowed(p, s, i), last = allowed(p, s, i + count - 1);
  if (seen == Shown::all && count == ROWS && j >= last.lo && j + NR <= first.hi) return false;
  for (int64_t r = 0; r < ROWS; ++r) bits[r] = r < count ? visible_bits(p, s, h, i + r, j, seen != Shown::all) : 0;
  return true;
}

POSATTN_INLINE vf keep(vf x, uint64_t bits) {
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)x);
}

// 2^x, and 1 at 0: within 1e-4, a fortieth of bfloat16's rounding, or within 9.2e-8. Rounding by a constant of ulp 1
// leaves the one port that multiplies beside the tiles to products; an infinity gives NaN, which the general path
// takes.
template <class M>
POSATTN_INLINE vf exp2_of_weight(vf x) {
  const vf shift = set1(12582912.0F), whole = x + shift - shift, f = x - whole;
  vf p;
  if constexpr (M::parts == 1) {
    p = fma(set1(5.500893e-02F), f, set1(2.4221096e-01F));
    p = fma(p, f, set1(6.9328293e-01F));
  } else {
    p = fma(set1(1.326470869e-03F), f, set1(9.671511129e-03F));
    p = fma(p, f, set1(5.550733954e-02F));
    p = fma(p, f, set1(2.402224243e-01F));
    p = fma(p, f, set1(6.931470037e-01F));
  }
  p = fma(p, f, set1(1.0F));
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
}

// Two vectors of a row of P as an operand's pairs, part by part: neighbours, or (c, c + 16).
template <class M>
POSATTN_INLINE void put_pairs(float* to, int64_t part, vf a, vf b) {
  if constexpr (M::parts == 1)
    store(to, bf16_row(a, b));
  else
    split_pair<M::parts>(a, b, to, part);
}

// call(Piece<n>()) for 0 .. 15: what comes beside sixteen rows of a panel, one after the other.
template <int N>
struct Piece {
  static constexpr int value = N;
};
template <class Call>
POSATTN_INLINE void for_pieces(const Call& call) {
  call(Piece<0>()), call(Piece<1>()), call(Piece<2>()), call(Piece<3>());
  call(Piece<4>()), call(Piece<5>()), call(Piece<6>()), call(Piece<7>());
  call(Piece<8>()), call(Piece<9>()), call(Piece<10>()), call(Piece<11>());
  call(Piece<12>()), call(Piece<13>()), call(Piece<14>()), call(Piece<15>());
}

// A panel of products [ROWS][NR] becomes weights against the rows' references, as operand of P V (32 keys a tile), and
// adds to the rows' sums by lane. Says whether these are within their limit, and no NaN. `meanwhile` is called in every
// row.
template <class M, bool MASKED, class Finish, class Meanwhile>
inline bool weigh_panel(const float* scores, float* pairs, const float* references, const float* sums, float* next,
                        const uint64_t* bits, Meanwhile& meanwhile, const Finish& finish) {
  constexpr int64_t PART = GROUP_ROWS * TILE;
  vf total = zero();
  for (int first = 0; first < ROWS; first += 16)
    for_pieces([&](auto piece) __attribute__((always_inline)) {
      const int r = first + piece.value;
      meanwhile.template run<piece.value>(r);
      const vf reference = set1(references[r]);
      vf w[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        w[v] = exp2_of_weight<M>(finish(r, v * VL, load(scores + r * NR + v * VL)) - reference);
        if (MASKED) w[v] = keep(w[v], bits[r] >> (v * VL));
      }
      const vf sum = load(sums + r * VL) + ((w[0] + w[1]) + (w[2] + w[3]));
      store(next + r * VL, sum);
      total += sum;
      put_pairs<M>(pairs + r * TILE, PART, w[0], w[1]);
      put_pairs<M>(pairs + M::parts * PART + r * TILE, PART, w[2], w[3]);
    });
  return _mm512_cmp_ps_mask((__m512)total, (__m512)set1(SUM_LIMIT), _CMP_NLE_UQ) == 0;
}

// Raises the references to a panel's maxima, rounded to whole numbers, and scales what rows have so far. Says whether
// all are within their limit.
template <class Finish>
inline bool raise_references(const float* scores, float* references, float* sums, float* out, int64_t width,
                             const uint64_t* bits, const Finish& finish) {
  bool within = true;
  for (int r = 0; r < ROWS; ++r) {
    vf top = set1(NEG_INF), unordered = zero();
    for (int v = 0; v < 4; ++v) {
      const auto mask = static_cast<__mmask16>(bits[r] >> (v * VL));
      const vf x = finish(r, v * VL, load(scores + r * NR + v * VL));
      top = (vf)_mm512_mask_max_ps((__m512)top, mask, (__m512)top, (__m512)x);
      unordered += (vf)_mm512_maskz_mov_ps(mask, (__m512)(x - x));
    }
    if (bits[r] == 0) continue;
    const float most = reduce_max(top), next = __builtin_rintf(most), last = references[r];
    within = within && most < REFERENCE_LIMIT && most > -REFERENCE_LIMIT && reduce_add(unordered) == 0.0F;
    if (!(next > last)) continue;
    references[r] = next;
    if (last == NEG_INF) continue;
    const float kept = exp2_scalar(last - next);
    scale_row(sums + r * VL, kept, VL);
    scale_row(out + r * width, kept, width);
  }
  return within;
}

inline bool all_measured(const float* references) {
  bool all = true;
  for (int r = 0; r < ROWS; ++r) all = all && references[r] > NEG_INF;
  return all;
}

// Up to ROWS rows of a task: their place and state.
struct RowBlock {
  int64_t i, count;         // first row, inside the sequence, and how many there are
  TileOperand q;            // [ROWS][head_dim]
  float *references, *out;  // of these rows
  float *sums, *spare;
  float* pairs;
  bool measured;  // whether every row has a reference
  int64_t done;   // the chunk's keys from here on wait as weights
};

// What passes beside a panel's weights: the next keys on their way to the first-level cache, or the next panel's
// products. Products of parts take long enough to hide the weights behind; bfloat16's do not.
template <class M>
struct Meanwhile {
  const char* ahead = nullptr;
  int64_t bytes = 0;  // a row's share of the next keys
  PiecewiseProducts<M::parts> products;
  template <int PIECE>
  POSATTN_INLINE void run(int r) {
    if constexpr (M::parts == 1)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + r * bytes + at, 0, 3);
    else
      products.template take<PIECE>();
  }
};

// The blocks that share what they read of K and V: it comes from the second-level cache once for all of them.
template <class M>
struct TileGroup {
  const Problem& p;
  const Sequence& s;
  TileForwardScratch<M>& t;
  int64_t steps;  // of the products over the head dimension
  RowBlock blocks[GROUP_BLOCKS];
  int64_t n;

  struct Visit {
    int64_t block, key;  // the panel's first, in the tile
    Shown seen;
  };
  static constexpr int64_t VISITS = GROUP_BLOCKS * TILE_KEYS / NR;

  // The keys j + begin .. j + end of a tile. Says whether the fast path holds.
  bool run(int64_t j, int64_t begin, int64_t end, const TileOperand& k, int64_t panel, const TileOperand& v) {
    const auto keys_at = [&](int64_t key) {
      TileOperand at = k;
      at.at = k.tile(0, 0) + key / NR * panel;
      return at;
    };
    Visit visits[VISITS + 1];
    int64_t count = 0;
    for (int64_t c = end - NR; c >= begin; c -= NR)
      for (int64_t b = 0; b < n; ++b) {
        const RowBlock& block = blocks[b];
        const Shown seen = shown(p, s, t.bias.head, block.i, block.i + block.count, j + c);
        visits[count++] = {b, c, seen};
      }
    int64_t at = 0;          // the visit that comes next
    float* ready = nullptr;  // its products, if they are there already
    for (int64_t to = end; to > begin; to -= CHUNK_KEYS) {
      const int64_t from = imax(begin, to - CHUNK_KEYS);
      for (int64_t b = 0; b < n; ++b) blocks[b].done = to;
      for (; at < count && visits[at].key >= from; ++at) {
        const Visit& visit = visits[at];
        RowBlock& block = blocks[visit.block];
        const int64_t c = visit.key;
        if (visit.seen == Shown::none) {
          clear(block, c - from);
          continue;
        }
        float* scores = ready ? ready : t.scores[0];
        if (!ready) {
          if constexpr (M::parts == 1)
            tile_rows(block.q, keys_at(c), NR / VL, scores, NR, steps);
          else
            tile_product<M::parts, false>(block.q, 2, keys_at(c), NR / VL, scores, NR, steps);
        }
        Meanwhile<M> meanwhile;
        ready = nullptr;
        if constexpr (M::parts == 1) {
          meanwhile.ahead = keys_at(visit.block == n - 1 && c > begin ? c - NR : c).tile(0, 0);
          meanwhile.bytes = steps * 128;
        } else {
          int64_t next = at + 1;
          while (next < count && visits[next].seen == Shown::none) ++next;
          if (next < count) {
            ready = scores == t.scores[0] ? t.scores[1] : t.scores[0];
            meanwhile.products.add(blocks[visits[next].block].q, keys_at(visits[next].key), ready, steps);
          }
        }
        const auto use = [&](const auto& finish) {
          return weigh(block, scores, j, c, from, visit.seen, v, meanwhile, finish);
        };
        if (!with_diagonal_bias(t.bias, t.slopes, t.intercepts, left_to_scale<M>(p.scale), block.i, j + c, use))
          return false;
        if constexpr (M::parts > 1) meanwhile.products.finish();
      }
      add_waiting(from, v);
    }
    return true;
  }

  template <class Finish>
  bool weigh(RowBlock& b, const float* scores, int64_t j, int64_t c, int64_t from, Shown seen, const TileOperand& v,
             Meanwhile<M>& meanwhile, const Finish& finish) {
    uint64_t bits[ROWS];
    const bool masked = panel_mask(p, s, t.bias.head, b.i, b.count, j + c, seen, bits);
    float* to = b.pairs + (c - from) / TILE_DEPTH * M::parts * GROUP_ROWS * TILE;
    auto run = [&] {
      return masked ? weigh_panel<M, true>(scores, to, b.references, b.sums, b.spare, bits, meanwhile, finish)
                    : weigh_panel<M, false>(scores, to, b.references, b.sums, b.spare, bits, meanwhile, finish);
    };
    if (!b.measured || !run()) {
      for (int64_t r = 0; !masked && r < ROWS; ++r) bits[r] = ~uint64_t{0};
      if constexpr (M::parts > 1) meanwhile.products.finish();  // the tiles are needed
      add_values(b, 1, from, c + NR, v);                        // what waits is measured by the old references
      b.done = c + NR;
      if (!raise_references(scores, b.references, b.sums, b.out, t.v_stride, bits, finish) || !run()) return false;
      b.measured = all_measured(b.references);
    }
    float* swap = b.sums;
    b.sums = b.spare, b.spare = swap;
    return true;
  }

  // The weights of a panel that nobody sees.
  void clear(const RowBlock& b, int64_t at) const {
    for (int64_t c = at; c < at + NR; c += TILE_DEPTH)
      for (int part = 0; part < M::parts; ++part)
        fill(b.pairs + (c / TILE_DEPTH * M::parts + part) * GROUP_ROWS * TILE, 0.0F, ROWS * TILE);
  }

  void add_waiting(int64_t from, const TileOperand& v) {
    if (n == GROUP_BLOCKS && blocks[0].done == blocks[1].done)
      return add_values(blocks[0], GROUP_BLOCKS, from, from, v);
    for (int64_t b = 0; b < n; ++b) add_values(blocks[b], 1, from, from, v);
  }

  // out += P V of so many blocks from b on, over the keys begin .. b.done of the tile; the chunk starts at `from`.
  void add_values(const RowBlock& b, int64_t count, int64_t from, int64_t begin, TileOperand v) {
    if (begin >= b.done) return;
    constexpr int64_t PART = GROUP_ROWS * TILE;
    const TileOperand weights{b.pairs + (begin - from) / TILE_DEPTH * M::parts * PART, 64, M::parts * PART * 4,
                              TILE * 64, PART * 4};
    v.at = v.tile(begin / TILE_DEPTH, 0);
    tile_product<M::parts, true>(weights, 2 * count, v, t.v_stride / TILE, b.out, t.v_stride,
                                 (b.done - begin) / TILE_DEPTH);
  }
};

// Says whether it could.
template <class M>
inline bool tile_forward_task(const Problem& p, const Sequence& s, int64_t h, int64_t i0, int64_t i1,
                              const PackedKeys<M>& packed, TileForwardScratch<M>& t, SharedLargest& largest_q) {
  const int64_t kv_head = h / (p.heads / p.kv_heads), rows = i1 - i0, padded = round_up(rows, ROWS);
  const int64_t steps = ceil_div(p.head_dim, TILE_DEPTH);
  const Source queries = query_source(p, s, h, 1.0F);

  t.bias.prepare(p, p.bias, s, h, {i0, i1, 0, s.k_len});
  change_base(t.bias, t.slopes, t.intercepts);  // in units of log2 from here on
  // Whole blocks of bfloat16 queries are read as they lie, where they lie as tiles.
  const float* in_memory = M::parts == 1 ? in_place<AMX>(queries, i0, rows) : nullptr;
  const int64_t copied = in_memory ? rows / ROWS * ROWS : 0;
  if constexpr (M::parts == 1) {
    pack_rows<AMX>(t.q + copied * t.q_stride, t.q_stride, queries, i0 + copied, rows - copied, padded - copied);
  } else {
    Largest largest;
    split_rows<M::parts>(t.q, queries, i0, rows, padded, scale_of_log2(p.scale), largest);
    largest_q.see(largest);
  }
  const auto query_rows = [&](int64_t r) {
    if constexpr (M::parts > 1) return split_rows_operand<M::parts>(t.q + r * M::parts * t.q_stride, p.head_dim);
    const float* at = r < copied ? in_memory + r * (p.q.row / 2) : t.q + r * t.q_stride;
    const int64_t stride = (r < copied ? p.q.row / 2 : t.q_stride) * 4;
    return TileOperand{at, stride, 64, TILE * stride, 0};
  };
  fill(t.out, 0.0F, padded * t.v_stride);
  fill(t.references, NEG_INF, rows);
  fill(t.references + rows, 0.0F, padded - rows);
  fill(t.sums[0], 0.0F, padded * VL);

  const Interval all = needed_by_any(p, s, h, i0, i1);
  bool odd[ROWS_PER_TASK / ROWS] = {};  // which of the two holds a block's sums
  for (int64_t j = ceil_div(all.hi, TILE_KEYS) * TILE_KEYS - TILE_KEYS;
       j + TILE_KEYS > all.lo && j >= 0 && !interrupted(); j -= TILE_KEYS) {
    const int64_t tile = imin(TILE_KEYS, s.k_len - j);
    for (int64_t g = 0; g < rows; g += GROUP_ROWS) {
      const Interval any = needed_by_any(p, s, h, i0 + g, i0 + imin(g + GROUP_ROWS, rows));
      if (any.lo >= j + tile || any.hi <= j) continue;
      const int64_t begin = imax(any.lo - j, 0) / NR * NR, end = round_up(imin(any.hi - j, tile), NR);
      TileGroup<M> group{p, s, t, steps, {}, 0};
      for (int64_t r = g; r < imin(g + GROUP_ROWS, rows); r += ROWS) {
        const bool swapped = odd[r / ROWS];
        group.blocks[group.n++] = {i0 + r,
                                   imin(ROWS, rows - r),
                                   query_rows(r),
                                   t.references + r,
                                   t.out + r * t.v_stride,
                                   t.sums[swapped] + r * VL,
                                   t.sums[!swapped] + r * VL,
                                   t.pairs + (r - g) * TILE,
                                   all_measured(t.references + r),
                                   0};
      }
      if (!group.run(j, begin, end, packed.keys(s, kv_head, j), packed.bytes_of_panel(), packed.values(s, kv_head, j)))
        return false;
      for (int64_t b = 0; b < group.n; ++b) {
        const int64_t r = g + b * ROWS;
        odd[r / ROWS] = group.blocks[b].sums != t.sums[0] + r * VL;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = reduce_add(load(t.sums[odd[r / ROWS]] + r * VL));
    write_row(p, s, h, i0 + r, t.out + r * t.v_stride, static_cast<double>(t.references[r]) * LN2, sum);
  }
  return true;
}

// Says whether it could: if not, the general path takes the whole call, so that which rows it takes does not depend on
// how many are a task.
template <class M>
inline bool tile_forward_fast(const Problem& p) {
  if (!is_simple(p, M::parts == 1 ? p.scale : 1.0F) || p.dropout_p > 0.0) return false;
  const PackedKeys<M> packed(p);
  if (!packed.fit()) return false;
  SharedLargest largest_q;
  Counter failed;
  for_runs_of_rows<M, TileForwardScratch<M>>(
      p, [&](const Sequence& s, int64_t h, int64_t i0, int64_t i1, TileForwardScratch<M>& scratch) {
        if (__atomic_load_n(&failed.value, __ATOMIC_RELAXED) != 0) return;
        if (!tile_forward_task(p, s, h, i0, i1, packed, scratch, largest_q)) failed.next();
      });
  return failed.value == 0 && largest_q.fits();
}

template <class M>
void tile_forward(const Problem& call) {
  with_reach(call, [](const Problem& p) {
    using General = typename M::General;
    if (!tile_forward_fast<M>(p)) forward_rows<General>(p);
  });
}

}  // namespace posattn::POSATTN_ISA
