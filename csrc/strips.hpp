// What surveys of a tile share: its strips in order, an expert's scores of a strip, and sums in a fixed order (kLanes
// partial sums, folded pairwise), the same for every instruction set.
#pragma once

#include "strip.hpp"

namespace ota {
namespace OTA_ISA {

constexpr int kLanes = 8;

inline double fold(const double* lanes) {
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Adds values whose places in [n, kStrip) are 0.
inline void add_to_lanes(const double* values, int n, double* lanes) {
    for (int i = 0; i < n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
}

// Calls step(strip) for each strip of the tile, its base loaded.
template <typename Acc, typename Step>
void by_strips(const Tile& tile, Strip<Acc>& x, Step step) {
    for (int64_t offset = 0; offset < tile.n; offset += kStrip) {
        go_to(tile, offset, x);
        load_base(tile, x);
        step();
    }
}

// Expert t's edits (x.edits[t], 0 where an input is not usable) and its scores as they are counted, of the strip.
// usable: where its inputs are, or none where all are.
template <typename Acc>
const int32_t* score(const Tile& tile, int t, Strip<Acc>& x, SurveyStats& stats, int32_t* room, float* used) {
    bool bad = tile.has_base() && count_unusable_base(x, stats.base);
    if (is_suspect(tile, t, x)) bad |= count_unusable(tile, t, x, stats.weights, stats.curvature);
    if (bad) find_usable(tile, t, x, room);
    share_scores(tile, x);
    if (tile.words.score != Score::spread) find_edits(tile, t, x);
    use(find_scores(tile, t, x), bad ? room : nullptr, x.n, used);
    if (bad)
        for (int i = 0; i < x.n; ++i) x.edits[t][i] = room[i] ? x.edits[t][i] : 0.0f;
    return bad ? room : nullptr;
}

}  // namespace OTA_ISA
}  // namespace ota
