// Which edits of many strips are kept, block by block in registers: inputs of one type, edits from the base, all words but
// `random by rank`. The operations and their order are those of stages.hpp and strip.hpp: results are equal bit for bit.
#pragma once

#include "lanes.hpp"
#include "strip.hpp"

namespace ota {
namespace OTA_ISA {

#if defined(OTA_LANES)

namespace lanes {

// Which of the elements [at, at + n) of a tensor have first <= flat index <= last.
enum class Tied { none, all, some };

inline Tied tied(int64_t at, int64_t n, int64_t first, int64_t last) {
    if (first > at + n - 1 || last < at) return Tied::none;
    return first <= at && last >= at + n - 1 ? Tied::all : Tied::some;
}

// Where that is so of a vector.
inline Mask between(int64_t at, int64_t first, int64_t last) {
    const Tied found = tied(at, OTA_LANES, first, last);
    if (found != Tied::some) return found == Tied::all ? everywhere() : nowhere();
    const int64_t begin = first > at ? first - at : 0, end = last < at + OTA_LANES - 1 ? last - at + 1 : OTA_LANES;
    return mask_of(((1u << end) - 1u) & ~((1u << begin) - 1u));
}

// One expert. w, h: element 0 of the strips (h of rank-1 curvature: its column).
struct Source {
    const Expert* expert;
    const uint8_t *w, *h;
    float row, row_score, end;  // numbers of this row; the first number above the bracket
    double row_weight;
    uint32_t most;  // random words up to this one are kept
    Tied tied, tied_upper;  // of the scores that equal the threshold, or the upper one
    Bits kept;      // in each lane
};

// Blocks of V vectors of a tile whose weights are of the type W.
template <typename W, int V>
struct Marks {
    static constexpr int kSize = V * OTA_LANES;
    static_assert(kStrip % kSize == 0, "a strip is a whole number of blocks");

    const Tile& tile;
    const int64_t offset;  // of element 0 of the strips
    const bool reads_h;
    const uint8_t* base;
    int64_t column = 0;    // of element 0, where that matters
    Bits top = all(0u);    // the largest suspicion of the inputs
    Source sources[kMaxExperts];
    Floats edits[kMaxExperts][V];
    Mask keep[kMaxExperts][V];

    // Of n elements.
    Marks(const Tile& tile, int64_t offset, int64_t n)
        : tile(tile), offset(offset), reads_h(tile.words.read_curvature()), base(tile.base.data + offset * W::size) {
        for (int t = 0; t < tile.n_experts; ++t) {
            const Expert& e = tile.experts[t];
            const Curvature& c = e.curvature;
            Source& x = sources[t];
            x.expert = &e, x.kept = all(0u), x.w = e.weights.data + offset * W::size, x.h = nullptr;
            if (c.kind == CurvatureKind::log8) x.h = c.codes + offset;
            if (c.kind == CurvatureKind::full) x.h = c.values.data + offset * item_size(c.values.dtype);
            x.end = bit_cast<float>(bit_cast<uint32_t>(e.threshold) + e.span);
            x.tied = tied(tile.start + offset, n, e.first, e.last), x.tied_upper = tied(tile.start + offset, n, 0, e.upto);
            // (word >> 8) 2^-24 < p
            const double words = std::ceil(static_cast<double>(static_cast<float>(e.probability)) * 0x1p24) * 256;
            x.most = words >= 0x1p32 ? 0xffffffffu : words > 0 ? static_cast<uint32_t>(words) - 1 : 0;
        }
    }

    // What is one number in a row: elements from `begin` on are of this row, from `column_of_begin` on.
    void enter(int64_t row, int64_t column_of_begin, int begin) {
        column = column_of_begin - begin;
        for (int t = 0; t < tile.n_experts; ++t) {
            Source& x = sources[t];
            const Curvature& c = x.expert->curvature;
            if (c.kind == CurvatureKind::rank1) x.h = reinterpret_cast<const uint8_t*>(c.columns + column);
            if (c.kind == CurvatureKind::rank1 || c.kind == CurvatureKind::log8) x.row = c.rows[row];
            if (tile.words.weigh == Weigh::by_row) x.row_weight = x.expert->weights_at[row];
            if (tile.words.score == Score::row_magnitude) x.row_score = x.expert->row_scores[row];
        }
    }

    void read_base(int i, Floats* b) const {
        if (tile.has_base()) fetch_ahead(base, i, W::size);
        for (int v = 0; v < V; ++v) b[v] = tile.has_base() ? W::read(base, i + v * OTA_LANES) : all(0.0f);
    }

    static void fetch_ahead(const uint8_t* p, int i, int size) {
        for (int byte = 0; byte < kSize * size; byte += 64) __builtin_prefetch(p + (i + kAhead) * size + byte, 0, 3);
    }

    void fetch_ahead(const Source& x, int i) const {
        fetch_ahead(x.w, i, W::size);
        if (reads_h && x.h != nullptr) fetch_ahead(x.h, i, 4);
    }

    // h of expert t.
    void read_curvature(const Source& x, int i, Floats* h) const {
        const Curvature& c = x.expert->curvature;
        const auto each = [&](auto of) {
            for (int v = 0; v < V; ++v) h[v] = of(i + v * OTA_LANES);
        };
        switch (c.kind) {
            case CurvatureKind::rank1: return each([&](int j) { return mul(all(x.row), F32::read(x.h, j)); });
            case CurvatureKind::log8: return each([&](int j) { return mul(Codes::read(x.h, j), all(x.row)); });
            case CurvatureKind::full:
                if (c.values.dtype == DType::f32) return each([&](int j) { return F32::read(x.h, j); });
                return each([&](int j) { return BF16::read(x.h, j); });
            default: return each([&](int) { return all(1.0f); });
        }
    }

    void read_edits(int t, int i, const Floats* b, Floats* d) const {
        fetch_ahead(sources[t], i);
        for (int v = 0; v < V; ++v) d[v] = sub(W::read(sources[t].w, i + v * OTA_LANES), b[v]);
    }

    // One score of all experts.
    void find_spread(Floats* s) const {
        const Floats scale = all(65536.0f), share = all(static_cast<float>(1.0 / tile.n_experts));
        for (int v = 0; v < V; ++v) {
            Floats mean = all(0.0f), sum = all(0.0f);
            const Floats first = mul(edits[0][v], scale);
            for (int t = 1; t < tile.n_experts; ++t) mean = add(mean, sub(mul(edits[t][v], scale), first));
            mean = mul(mean, share);
            for (int t = 0; t < tile.n_experts; ++t) {
                const Floats apart = sub(sub(mul(edits[t][v], scale), first), mean);
                sum = add(sum, mul(apart, apart));
            }
            s[v] = sum;
        }
    }

    void find_scores(const Source& x, const Floats* d, int i, Floats* s, Bits& suspect) const {
        Floats h[V];
        switch (tile.words.score) {
            case Score::magnitude:
                for (int v = 0; v < V; ++v) s[v] = size(d[v]);
                return;
            case Score::row_magnitude:
                for (int v = 0; v < V; ++v) s[v] = mul(size(mul(d[v], all(65536.0f))), all(x.row_score));
                return;
            case Score::saliency:
            case Score::curvature:
                read_curvature(x, i, h);
                for (int v = 0; v < V; ++v) {
                    suspect = larger(suspect, bits(h[v]));
                    const Floats scaled = mul(d[v], all(65536.0f)), of_h = mul(h[v], all(x.expert->score_scale));
                    s[v] = tile.words.score == Score::saliency ? mul(of_h, mul(scaled, scaled)) : of_h;
                }
                return;
            case Score::none:
                for (int v = 0; v < V; ++v) s[v] = all(0.0f);
                return;
            case Score::spread: return;  // found before
        }
    }

    // Where scores reach a threshold; of those that equal it, where first <= flat index <= last.
    static void reach(const Floats* s, float threshold, Tied tied, int64_t at, int64_t first, int64_t last, Mask* m) {
        const Floats least = all(threshold);
        if (tied == Tied::all) {
            for (int v = 0; v < V; ++v) m[v] = at_least(s[v], least);
            return;
        }
        for (int v = 0; v < V; ++v) m[v] = above(s[v], least);
        for (int v = 0; tied == Tied::some && v < V; ++v)
            m[v] = either(m[v], both(equal(s[v], least), between(at + v * OTA_LANES, first, last)));
    }

    // Which edits an expert keeps.
    void select(const Source& x, int i, const Floats* s, Mask* m) const {
        const Expert& e = *x.expert;
        const int64_t at = tile.start + offset + i;
        switch (tile.words.select) {
            case Select::at_least: return reach(s, e.threshold, x.tied, at, e.first, e.last, m);
            case Select::between: {
                Mask most[V];
                Floats negative[V];
                for (int v = 0; v < V; ++v) negative[v] = sub(all(-0.0f), s[v]);
                reach(s, e.threshold, x.tied, at, e.first, e.last, m);
                reach(negative, -e.upper, x.tied_upper, at, 0, e.upto, most);
                for (int v = 0; v < V; ++v) m[v] = both(m[v], most[v]);
                return;
            }
            case Select::above:
                for (int v = 0; v < V; ++v) m[v] = above(s[v], all(e.threshold));
                return;
            case Select::random: {
                Bits words[V];
                Philox(tile.numbers, e.position).words<V / 2>(static_cast<uint64_t>(at) >> 2, words);
                for (int v = 0; v < V; ++v) m[v] = e.probability > 0 ? at_most(words[v], all(x.most)) : nowhere();
                return;
            }
            default:
                for (int v = 0; v < V; ++v) m[v] = everywhere();
        }
    }

    // Calls step(t, d, m) for each expert in turn: its edits, which edits[t] has too, and which of them it keeps. Where a
    // score lies in its bracket, the expert keeps the edit and the element waits (waits: none of interest). counted: scores
    // are as they are counted (see `use`).
    template <typename Step>
    void mark(int i, const Floats* b, Mask* waits, bool counted, Step step) {
        // The commonest score apart: one branch of a block.
        if (tile.words.score == Score::magnitude) return mark<true>(i, b, waits, false, step);
        mark<false>(i, b, waits, counted, step);
    }

    template <bool Magnitude, typename Step>
    void mark(int i, const Floats* b, Mask* waits, bool counted, Step step) {
        Floats s[V], zeros[V];
        Bits suspect = top;
        const bool shared = !Magnitude && tile.words.score == Score::spread;
        for (int v = 0; v < V; ++v) zeros[v] = all(0.0f);
        for (int t = 0; shared && t < tile.n_experts; ++t) read_edits(t, i, b, edits[t]);
        if (shared) find_spread(s);
        for (int t = 0; t < tile.n_experts; ++t) {
            Source& x = sources[t];
            Floats d[V];
            Mask m[V];
            if (!shared) read_edits(t, i, b, d);
            for (int v = 0; v < V; ++v) {
                if (shared) d[v] = edits[t][v];
                edits[t][v] = d[v];
                zeros[v] = fma(d[v], all(0.0f), zeros[v]);  // NaN, once an edit is not finite
            }
            if (!Magnitude) find_scores(x, d, i, s, suspect);
            for (int v = 0; Magnitude && v < V; ++v) s[v] = size(d[v]);
            for (int v = 0; counted && v < V; ++v) s[v] = zero_unless(above(s[v], all(0.0f)), s[v]);
            select(x, i, s, m);
            if (waits != nullptr && x.expert->span != 0)
                for (int v = 0; v < V; ++v) waits[v] = either(waits[v], not_at_least(m[v], s[v], all(x.end)));
            Bits kept = x.kept;
            for (int v = 0; v < V; ++v) kept = count(kept, m[v]);
            x.kept = kept;
            step(t, d, m);
        }
        for (int v = 0; v < V; ++v) suspect = larger(suspect, magnitude(zeros[v]));
        top = suspect;
    }
};

// Whether the tile's inputs are read in one way, in whole blocks of `size` elements of one row where rows matter.
inline bool are_marked_in_blocks(const Tile& tile, int size) {
    const Words& words = tile.words;
    const DType type = tile.experts[0].weights.dtype;
    bool fits = type == DType::bf16 || type == DType::f16 || type == DType::f32;
    fits &= tile.index == nullptr && words.select != Select::random_by_rank && words.edit != Edit::by_chance;
    fits &= words.select != Select::random || tile.start % 4 == 0;
    fits &= !tile.has_base() || tile.base.dtype == type;
    const bool by_rows = words.weigh == Weigh::by_row || words.weigh == Weigh::by_column || words.score == Score::row_magnitude;
    fits &= !by_rows || (tile.columns % size == 0 && tile.start % size == 0);
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        const Curvature& c = e.curvature;
        fits &= e.weights.dtype == type && e.origin.data == nullptr;
        fits &= e.span == 0 || (words.select == Select::at_least && !has_ties(e));
        if (!words.read_curvature() || c.kind == CurvatureKind::uniform) continue;
        const bool whole = c.kind == CurvatureKind::full;
        fits &= c.kind != CurvatureKind::low_rank;
        fits &= !whole || c.values.dtype == DType::f32 || c.values.dtype == DType::bf16;
        fits &= whole || (c.start == tile.start && c.n_columns == tile.columns && c.start % size == 0 && c.n_columns % size == 0);
    }
    return fits;
}

// Whether something is one number in a row.
inline bool has_rows(const Tile& tile) {
    const Words& words = tile.words;
    bool rows = words.weigh == Weigh::by_row || words.weigh == Weigh::by_column || words.score == Score::row_magnitude;
    for (int t = 0; t < tile.n_experts && words.read_curvature(); ++t) {
        const CurvatureKind kind = tile.experts[t].curvature.kind;
        rows |= kind == CurvatureKind::rank1 || kind == CurvatureKind::log8;
    }
    return rows;
}

// Calls step(begin, end) for the n elements of `marks`, in pieces of one row where rows matter.
template <typename M, typename Step>
inline void in_rows(M& marks, int n, Step step) {
    const Tile& tile = marks.tile;
    if (!has_rows(tile)) return step(0, n);
    by_rows({tile.start + marks.offset, nullptr, tile.columns}, n, [&](int begin, int end, int64_t row, int64_t column) {
        marks.enter(row, column, begin);
        step(begin, end);
    });
}

// Calls step with a value of the type that reads the tile's weights.
template <typename Step>
inline auto with_type(DType type, Step step) {
    if (type == DType::bf16) return step(BF16());
    return type == DType::f16 ? step(F16()) : step(F32());
}

}  // namespace lanes

#endif

}  // namespace OTA_ISA
}  // namespace ota
