// A strip of a tile's elements: what is read, and which of the edits are kept. merge.cpp adds them up, survey.cpp counts.
#pragma once

#include <new>

#include "random.hpp"

namespace ota {
namespace OTA_ISA {

// Experts whose sums are in registers together.
constexpr int kGroup = 6;

// Elements that are taken at once where they stay in registers.
constexpr int kSpan = 16 * kStrip;

// Besides float, the type of weights that loops read as they are stored.
template <typename Acc>
using Direct = std::conditional_t<std::is_same<Acc, double>::value, double, bf16>;

// Planes of the elements [offset, offset + n) of a tile, and room for what is decoded. All are aligned to cache lines:
// split accesses cost half of the speed.
template <typename Acc>
struct alignas(64) Strip {
    int64_t offset;
    int n;
    Place place;
    bool direct;              // whether experts' weights are read as Direct<Acc>
    const float* chances;     // p of `random by rank`, n of the tile for each expert
    alignas(64) Acc base[kStrip], numerator[kStrip], denominator[kStrip], origin_room[kStrip], p_room[kGroup][kStrip];
    alignas(64) Acc zeros[kStrip];
    alignas(64) int32_t ones[kStrip];     // -1
    uint8_t w_room[kGroup][kStrip * sizeof(Acc)];
    float h_room[kGroup][kStrip];
    alignas(64) float score_room[kStrip], spread[kStrip], elected[kStrip], largest[kStrip];
    alignas(64) int32_t any[kStrip], fallback[kStrip], number[kStrip];  // number: of experts that add or agree, or the winner's
    int32_t waits[kStrip + kSpare];      // 1 where a score lies in its bracket
    float edits[kMaxExperts][kStrip];    // d32
    int32_t keep[kMaxExperts][kStrip];   // -1 where an edit is kept; later, where it is added
};

// Whether all experts' weights can be read in place; in float64, whether some input has use for it.
template <typename Acc>
bool reads_direct(const Tile& tile) {
    bool all = true, some = false;
    for (int t = 0; t < tile.n_experts; ++t) {
        all &= tile.experts[t].weights.dtype == DType::bf16;
        some |= tile.experts[t].weights.dtype == DType::f64;
    }
    return std::is_same<Acc, double>::value ? some : all;
}

template <typename Acc>
void prepare(const Tile& tile, Strip<Acc>& x) {
    x.direct = reads_direct<Acc>(tile);
    x.chances = nullptr;
    std::memset(x.zeros, 0, sizeof(x.zeros));
    for (int i = 0; i < kStrip; ++i) x.ones[i] = -1;
}

template <typename Acc>
void go_to(const Tile& tile, int64_t offset, Strip<Acc>& x) {
    x.offset = offset;
    x.n = static_cast<int>(tile.n - offset < kStrip ? tile.n - offset : kStrip);
    x.place = {tile.start + offset, tile.index == nullptr ? nullptr : tile.index + offset, tile.columns};
}

template <typename Acc>
void load_plane(const Operand& x, int64_t offset, int n, Acc* out) {
    if constexpr (std::is_same<Acc, double>::value) {
        const double* values = view<double>(x, offset, n, out);
        if (values != out) std::memcpy(out, values, sizeof(double) * static_cast<size_t>(n));
    } else {
        const float* values = load(x, offset, n, out);
        if (values != out) std::memcpy(out, values, sizeof(float) * static_cast<size_t>(n));
    }
}

template <typename Acc>
void load_base(const Tile& tile, Strip<Acc>& x) {
    if (tile.has_base())
        load_plane(tile.base, x.offset, x.n, x.base);
    else
        std::memset(x.base, 0, sizeof(x.base));
}

// What expert t's edits are taken from.
template <typename Acc>
const Acc* origin(const Tile& tile, int t, Strip<Acc>& x) {
    if (tile.experts[t].origin.data == nullptr) return x.base;
    load_plane(tile.experts[t].origin, x.offset, x.n, x.origin_room);
    return x.origin_room;
}

// Calls step with expert t's weights of the strip, decoded into room number `room`.
template <typename Acc, typename Step>
auto with_weights(const Tile& tile, int t, int room, Strip<Acc>& x, Step step) {
    const Operand& w = tile.experts[t].weights;
    if (x.direct) return step(view(w, x.offset, x.n, reinterpret_cast<Direct<Acc>*>(x.w_room[room])));
    return step(view(w, x.offset, x.n, reinterpret_cast<float*>(x.w_room[room])));
}

template <typename Acc>
const float* curvature(const Tile& tile, int t, int room, Strip<Acc>& x) {
    return load(tile.experts[t].curvature, x.offset, x.n, x.h_room[room]);
}

// The largest of some suspicions of each place in a chunk: in vectors, so that chunks need no sum of their own.
struct Suspicions {
    uint32_t top[kChunk] = {};

    template <typename T, typename Of>
    void look(const T* values, int n, const Ahead& next, Of of) {
        int i = 0;
        for (; i + kChunk <= n; i += kChunk) {
            next.fetch(i);
            for (int j = 0; j < kChunk; ++j) top[j] = larger(top[j], of(values[i + j]));
        }
        for (int j = 0; i + j < n; ++j) top[j] = larger(top[j], of(values[i + j]));
    }

    bool any() const {
        uint32_t all = 0;
        for (uint32_t one : top) all = larger(all, one);
        return all >= kSuspect;
    }
};

// Whether some input of expert t may not be usable. Has the next strip fetched.
template <typename Acc>
bool is_suspect(const Tile& tile, int t, Strip<Acc>& x) {
    const Expert& e = tile.experts[t];
    Suspicions found;
    const auto of_weight = [](auto w) { return suspicion(static_cast<float>(w)); };
    with_weights(tile, t, 0, x, [&](const auto* w) {
        found.look(w, x.n, Ahead(e.weights, x.offset, tile.n), of_weight);
    });
    if (e.origin.data != nullptr)
        found.look(origin(tile, t, x), x.n, Ahead(e.origin, x.offset, tile.n), of_weight);
    if (tile.words.read_curvature() && e.curvature.kind != CurvatureKind::uniform)
        found.look(curvature(tile, t, 0, x), x.n, Ahead(e.curvature, x.offset, tile.n),
                   [](float h) { return suspicion_of_curvature(h); });
    return found.any();
}

// Where expert t's inputs and the base are usable: -1.
template <typename Acc>
void find_usable(const Tile& tile, int t, Strip<Acc>& x, int32_t* usable) {
    const bool reads = tile.words.read_curvature();
    const Acc* o = origin(tile, t, x);
    const float* h = reads ? curvature(tile, t, 0, x) : nullptr;
    with_weights(tile, t, 0, x, [&](const auto* w) {
        for (int i = 0; i < x.n; ++i)
            usable[i] = is_finite(static_cast<float>(w[i])) && is_finite(static_cast<float>(o[i])) &&
                                is_finite(static_cast<float>(x.base[i])) && (!reads || is_curvature(h[i]))
                            ? -1
                            : 0;
    });
}

// Counts what is not usable of expert t. Returns whether something is.
template <typename Acc>
bool count_unusable(const Tile& tile, int t, Strip<Acc>& x, NonFinite& weights, NonFinite& curvatures) {
    const int64_t before = weights.count + curvatures.count;
    const bool own = tile.experts[t].origin.data != nullptr;
    const Acc* o = origin(tile, t, x);
    with_weights(tile, t, 0, x, [&](const auto* w) {
        for (int i = 0; i < x.n; ++i)
            if (!is_finite(static_cast<float>(w[i])) || (own && !is_finite(static_cast<float>(o[i]))))
                weights.add(x.offset + i);
    });
    if (tile.words.read_curvature()) {
        const float* h = curvature(tile, t, 0, x);
        for (int i = 0; i < x.n; ++i)
            if (!is_curvature(h[i])) curvatures.add(x.offset + i);
    }
    return weights.count + curvatures.count > before;
}

template <typename Acc>
bool count_unusable_base(Strip<Acc>& x, NonFinite& base) {
    Suspicions found;
    found.look(x.base, x.n, Ahead(), [](Acc b) { return suspicion(static_cast<float>(b)); });
    if (!found.any()) return false;
    const int64_t before = base.count;
    for (int i = 0; i < x.n; ++i)
        if (!is_finite(static_cast<float>(x.base[i]))) base.add(x.offset + i);
    return base.count > before;
}

// Expert t's edits, x.edits[t].
template <typename Acc>
void find_edits(const Tile& tile, int t, Strip<Acc>& x) {
    const Acc* o = origin(tile, t, x);
    with_weights(tile, t, 0, x, [&](const auto* w) { difference32(w, o, x.n, x.edits[t]); });
}

// Expert t's edits and saliencies. Has its next strip fetched.
template <typename Acc>
void find_saliencies(const Tile& tile, int t, Strip<Acc>& x) {
    const Expert& e = tile.experts[t];
    const Acc* o = origin(tile, t, x);
    const float* h = curvature(tile, t, 0, x);
    float *d = x.edits[t], *s = x.score_room;
    const Ahead next_w(e.weights, x.offset, tile.n), next_h(e.curvature, x.offset, tile.n);
    with_weights(tile, t, 0, x, [&](const auto* w) {
        int i = 0;
        for (; i + kChunk <= x.n; i += kChunk) {
            next_w.fetch(i), next_h.fetch(i);
            saliencies(w + i, o + i, h + i, e.score_scale, kChunk, d + i, s + i);
        }
        saliencies(w + i, o + i, h + i, e.score_scale, x.n - i, d + i, s + i);
    });
}

// What all experts' scores share: the spread of their edits.
template <typename Acc>
void share_scores(const Tile& tile, Strip<Acc>& x) {
    if (tile.words.score != Score::spread) return;
    for (int t = 0; t < tile.n_experts; ++t) find_edits(tile, t, x);
    spread_of(x.edits, tile.n_experts, x.n, x.spread);
}

// Expert t's scores, from its edits.
template <typename Acc>
const float* find_scores(const Tile& tile, int t, Strip<Acc>& x) {
    const Expert& e = tile.experts[t];
    float* s = x.score_room;
    switch (tile.words.score) {
        case Score::none: std::memset(s, 0, sizeof(x.score_room)); break;
        case Score::saliency: saliencies(curvature(tile, t, 0, x), x.edits[t], e.score_scale, x.n, s); break;
        case Score::curvature: curvatures(curvature(tile, t, 0, x), e.score_scale, x.n, s); break;
        case Score::magnitude: magnitudes(x.edits[t], x.n, s); break;
        case Score::row_magnitude:
            by_rows(x.place, x.n, [&](int begin, int end, int64_t row, int64_t) {
                row_magnitudes(x.edits[t] + begin, e.row_scores[row], end - begin, s + begin);
            });
            break;
        case Score::spread: return x.spread;
    }
    return s;
}

// Where first <= flat index <= last: -1.
inline void find_between(const Place& place, int64_t first, int64_t last, int n, int32_t* inside) {
    for (int i = 0; i < n; ++i) inside[i] = place.at(i) >= first && place.at(i) <= last ? -1 : 0;
}

constexpr int64_t kLastIndex = INT64_MAX;

// Whether of edits whose scores equal the threshold, only some are kept.
inline bool has_ties(const Expert& e) { return e.first > 0 || e.last < kLastIndex; }

// Which of expert t's edits are kept: x.keep[t], from its scores.
template <typename Acc>
void select(const Tile& tile, int t, const float* s, Strip<Acc>& x) {
    const Expert& e = tile.experts[t];
    int32_t* keep = x.keep[t];
    int32_t* tied = x.fallback;  // not yet in use
    const int n = x.n;
    switch (tile.words.select) {
        case Select::all: std::memcpy(keep, x.ones, sizeof(x.ones)); break;
        case Select::at_least:
        case Select::between:
            if (has_ties(e)) {
                find_between(x.place, e.first, e.last, n, tied);
                at_least(s, e.threshold, tied, n, keep);
            } else {
                at_least(s, e.threshold, n, keep);
            }
            if (tile.words.select == Select::at_least) break;
            find_between(x.place, 0, e.upto, n, tied);
            at_most(s, e.upper, tied, n, keep);
            break;
        case Select::above: above(s, e.threshold, n, keep); break;
        case Select::random: {
            alignas(64) float u[kStrip];
            uniform(Philox(tile.numbers, e.position), x.place, n, u);
            below(u, static_cast<float>(e.probability), n, keep);
            break;
        }
        case Select::random_by_rank: {
            const float* p = x.chances + t * tile.n + x.offset;
            alignas(64) float u[kStrip];
            uniform(Philox(tile.numbers, e.position), x.place, n, u);
            for (int i = 0; i < n; ++i) keep[i] = u[i] < p[i] ? -1 : 0;
            break;
        }
    }
}

// Scores as they are counted: 0 where an input is not usable, or (a curvature above 2^96 times an edit of 0) the score
// is no number; and no -0. usable: none where all are.
inline void use(const float* s, const int32_t* usable, int n, float* used) {
    for (int i = 0; i < n; ++i) {
        const bool counts = (s[i] > 0.0f) & (usable == nullptr || usable[i] != 0);
        used[i] = counts ? s[i] : 0.0f;
    }
}

// p of the elements of a tile of whole rows for expert t, by their ranks. room: 4 rows, and a block of them.
template <typename Acc>
void find_chances(const Tile& tile, int t, Strip<Acc>& x, uint32_t* room, float* p) {
    const Expert& e = tile.experts[t];
    const int64_t length = tile.ranked, block = length * tile.apart;
    uint32_t *row = room, *bits = row + 3 * length;
    auto* of_rank = reinterpret_cast<float*>(bits + block);
    for (int64_t rank = 0; rank < length; ++rank) of_rank[rank] = probability_of_rank(e, rank, length);
    for (int64_t first = 0; first < tile.n; first += block) {
        for (int64_t at = 0; at < block; at += x.n) {
            go_to(tile, first + at, x);
            if (x.n > block - at) x.n = static_cast<int>(block - at);
            load_base(tile, x);
            find_edits(tile, t, x);
            for (int i = 0; i < x.n; ++i) bits[at + i] = suspicion(x.edits[t][i]);
        }
        for (int64_t begin = 0; begin < tile.apart; ++begin) {
            for (int64_t i = 0; i < length; ++i) row[i] = bits[begin + i * tile.apart];
            const uint32_t* order = sort_places(row, length, row + length, row + 2 * length);
            for (int64_t rank = 0; rank < length; ++rank) p[first + begin + order[rank] * tile.apart] = of_rank[rank];
        }
    }
}

// Those of the experts [first, last) in memory of their own; none where no word asks for them.
struct Ranked {
    float* chances = nullptr;

    template <typename Acc>
    Ranked(const Tile& tile, int first, int last, Strip<Acc>& x) {
        if (tile.words.select != Select::random_by_rank || tile.n == 0) return;
        const auto numbers = [](int64_t n) { return std::malloc(sizeof(float) * static_cast<size_t>(n)); };
        chances = static_cast<float*>(numbers(tile.n * tile.n_experts));
        auto* room = static_cast<uint32_t*>(numbers(tile.ranked * (4 + tile.apart)));
        if (chances == nullptr || room == nullptr) {
            std::free(chances), std::free(room);
            throw std::bad_alloc();
        }
        for (int t = first; t < last; ++t) find_chances(tile, t, x, room, chances + t * tile.n);
        std::free(room);
        x.chances = chances;
    }
    ~Ranked() { std::free(chances); }
    Ranked(const Ranked&) = delete;
    Ranked& operator=(const Ranked&) = delete;
};

}  // namespace OTA_ISA
}  // namespace ota
