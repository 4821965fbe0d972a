// Censuses of scores in registers: vectors of them to sums in float64, which are exact for as many elements as are merged at
// once.
#pragma once

#include "doubles.hpp"
#include "undecided.hpp"

namespace ota {
namespace OTA_ISA {

#if defined(OTA_LANES)

namespace lanes {

// Of one expert. A sum takes the 8th part of kSpan elements: 24 + kWindow - 1 + 9 bits.
struct Census {
    static_assert(kSpan / 8 <= 1 << 9, "24 + 20 + 9 bits");
    Windows windows;
    float low_first, low_end, end, high_last;
    alignas(64) double below[8], above[8];
    int64_t n_above;
};

// Of the experts of a tile that have one, of at most kSpan elements, until `finish` adds them up.
struct Censuses {
    static constexpr int kRest = 2 * kSpan;
    const Tile& tile;
    Census of[kMaxExperts];
    int n_rest = 0;  // scores in no window, to be counted one by one: few
    uint8_t expert_of_rest[kRest];
    uint32_t rest[kRest];

    explicit Censuses(const Tile& tile) : tile(tile) {
        for (int t = 0; t < tile.n_experts; ++t) {
            if (!has(t)) continue;
            Census& x = of[t];
            const Windows w(tile.experts[t]);
            x.windows = w, x.n_above = 0;
            x.low_first = bit_cast<float>(w.low_first), x.low_end = bit_cast<float>(w.low_end);
            x.end = bit_cast<float>(w.end), x.high_last = bit_cast<float>(w.high_last);
            std::memset(x.below, 0, sizeof(x.below)), std::memset(x.above, 0, sizeof(x.above));
        }
    }

    // V vectors of expert t's scores. What is no number above 0 counts as 0. Not inline: loops without a census keep
    // their registers.
    template <int V>
    __attribute__((noinline)) void add(int t, const Floats* s) {
        Census& x = of[t];
        Eight below, above;
        uint64_t left = 0, high_lanes = 0;
        below.load(x.below), above.load(x.above);
        for (int v = 0; v < V; ++v) {
            const Mask is_below = lanes::above(all(x.low_end), s[v]), is_above = at_least(s[v], all(x.end));
            const Mask low = both(is_below, at_least(s[v], all(x.low_first)));
            const Mask high = both(is_above, lanes::above(all(x.high_last), s[v]));
            below.add(In<double>::of(zero_unless(low, s[v])));
            above.add(In<double>::of(zero_unless(high, s[v])));
            high_lanes |= uint64_t{lanes_of(is_above)} << (v * OTA_LANES);
            const Mask in_none = without(either(is_below, is_above), either(low, high));
            left |= uint64_t{lanes_of(lanes::above(in_none, s[v], all(0.0f)))} << (v * OTA_LANES);
        }
        below.store(x.below), above.store(x.above);
        x.n_above += __builtin_popcountll(high_lanes);
        if (left == 0) return;
        alignas(64) float each[V * OTA_LANES];
        for (int v = 0; v < V; ++v) store(each + v * OTA_LANES, s[v]);
        for (; left != 0 && n_rest < kRest; left &= left - 1, ++n_rest) {
            expert_of_rest[n_rest] = static_cast<uint8_t>(t);
            rest[n_rest] = bit_cast<uint32_t>(each[__builtin_ctzll(left)]);
        }
    }

    bool has(int t) const { return tile.experts[t].census != nullptr; }

    // Whether there was room for all scores.
    bool are_whole() const { return n_rest < kRest; }

    void finish() const {
        for (int t = 0; t < tile.n_experts; ++t) {
            int64_t* census = tile.experts[t].census;
            if (!has(t)) continue;
            for (double sum : of[t].below) add_sum(sum, of[t].windows.low, census);
            for (double sum : of[t].above) add_sum(sum, of[t].windows.high, census + kExponents);
            census[2 * kExponents] += of[t].n_above;
        }
        for (int i = 0; i < n_rest; ++i) {
            const int t = expert_of_rest[i];
            count_score(rest[i], tile.experts[t], of[t].windows.end);
        }
    }
};

}  // namespace lanes

#endif

}  // namespace OTA_ISA
}  // namespace ota
