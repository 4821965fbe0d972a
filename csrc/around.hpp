// An expert's scores around some places of their order: counted by span, and those inside of an interval collected.
#pragma once

#include "marks.hpp"
#include "strips.hpp"

namespace ota {
namespace OTA_ISA {

// Numbers of one interval and span, in their order in kernels.hpp, from how many scores are above the highest, at least
// that, inside, and at least the lowest.
inline void note(int64_t above, int64_t from_highest, int64_t inside, int64_t from_lowest, int64_t* counts) {
    counts[0] = above, counts[1] = from_highest - above, counts[2] = inside;
    counts[3] = from_lowest - from_highest - inside;
}

// Of n scores of a span; counts are added to.
inline void look_around(const float* s, int n, Interval& of, int64_t* counts) {
    int64_t above = 0, from_highest = 0, inside = 0, from_lowest = 0;
    for (int i = 0; i < n; ++i) {
        above += s[i] > of.highest ? 1 : 0, from_highest += s[i] >= of.highest ? 1 : 0;
        from_lowest += s[i] >= of.lowest ? 1 : 0;
        of.inside[inside] = s[i];
        inside += s[i] > of.lowest && s[i] < of.highest ? 1 : 0;
    }
    of.inside += inside;
    int64_t some[kAround];
    note(above, from_highest, inside, from_lowest, some);
    for (int i = 0; i < kAround; ++i) counts[i] += some[i];
}

#if defined(OTA_LANES)

namespace lanes {

// Appends the lanes of m; a whole vector may be written.
inline float* append(Mask m, Floats x, float* out) {
#if OTA_LANES == 16
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m, x));
    return out + __builtin_popcount(m);
#else
    float each[OTA_LANES];
    store(each, x);
    for (uint32_t left = lanes_of(m); left != 0; left &= left - 1) *out++ = each[__builtin_ctz(left)];
    return out;
#endif
}

// One interval, in registers.
struct Around {
    float lowest, highest;
    float* inside;
    Bits above = all(0u), from_highest = all(0u), from_lowest = all(0u);

    void look(Floats s) {
        const Mask from_top = at_least(s, all(highest));
        const Mask between = without(lanes::above(s, all(lowest)), from_top);
        above = count(above, lanes::above(s, all(highest))), from_highest = count(from_highest, from_top);
        from_lowest = count(from_lowest, at_least(s, all(lowest)));
        if (lanes_of(between) != 0) inside = append(between, s, inside);
    }
};

// Of n elements from `offset` on, whole strips. False, and nothing is noted, where an input is not usable.
template <typename W, bool Magnitude>
bool look_around(const Tile& tile, int t, int64_t offset, int n, Interval* of, int intervals, int64_t* counts,
                 int64_t& nonzero) {
    constexpr int V = 2;
    Marks<W, V> x(tile, offset, n);
    const bool spread = !Magnitude && tile.words.score == Score::spread;
    Around around[kMaxIntervals];
    for (int k = 0; k < intervals; ++k) {
        Around& a = around[k];
        a.lowest = of[k].lowest, a.highest = of[k].highest, a.inside = of[k].inside;
    }
    Bits positive = all(0u), suspect = all(0u);
    Floats zeros = all(0.0f);
    in_rows(x, n, [&](int begin, int end) {
        for (int i = begin; i < end; i += x.kSize) {
            Floats b[V], d[V], s[V];
            x.read_base(i, b);
            for (int e = spread ? 0 : t; e < (spread ? tile.n_experts : t + 1); ++e) {
                x.read_edits(e, i, b, d);
                for (int v = 0; v < V; ++v) x.edits[e][v] = d[v], zeros = fma(d[v], all(0.0f), zeros);
            }
            if (spread) x.find_spread(s);
            if (!Magnitude && !spread) x.find_scores(x.sources[t], d, i, s, suspect);
            for (int v = 0; v < V; ++v) {
                if (Magnitude) s[v] = size(d[v]);
                const Mask counted = lanes::above(s[v], all(0.0f));
                positive = count(positive, counted);
                if (!Magnitude) s[v] = zero_unless(counted, s[v]);
                for (int k = 0; k < intervals; ++k) around[k].look(s[v]);
            }
        }
    });
    if (largest(larger(suspect, magnitude(zeros))) >= kSuspect) return false;
    nonzero += total(positive);
    for (int k = 0; k < intervals; ++k, counts += kAround) {
        const Around& a = around[k];
        note(total(a.above), total(a.from_highest), a.inside - of[k].inside, total(a.from_lowest), counts);
        of[k].inside = a.inside;
    }
    return true;
}

}  // namespace lanes

inline bool look_around_in_blocks(const Tile& tile, int t, int64_t offset, int n, Interval* of, int intervals,
                                  int64_t* counts, int64_t& nonzero) {
    using namespace lanes;
    if (n % kStrip != 0 || !are_marked_in_blocks(tile, 2 * OTA_LANES)) return false;
    return with_type(tile.experts[0].weights.dtype, [&](auto type) {
        using W = decltype(type);
        return tile.words.score == Score::magnitude
                   ? lanes::look_around<W, true>(tile, t, offset, n, of, intervals, counts, nonzero)
                   : lanes::look_around<W, false>(tile, t, offset, n, of, intervals, counts, nonzero);
    });
}

#else

inline bool look_around_in_blocks(const Tile&, int, int64_t, int, Interval*, int, int64_t*, int64_t&) { return false; }

#endif

}  // namespace OTA_ISA
}  // namespace ota
