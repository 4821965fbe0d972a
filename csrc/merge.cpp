// One tile in, one merged tile out, strip by strip, with nothing intermediate in memory: read, mark (which edits are
// kept), elect (which of these are added), add, finish. Single-threaded; the engine runs one tile per thread.
//
// Many strips are merged at once in registers where nothing is wrong with them: the common merge by salient.hpp, nearly
// all others by blocks.hpp. Where these find something wrong, a strip goes through all steps after all.

#include "alternatives.hpp"
#include "blocks.hpp"
#include "pack_stretches.hpp"

namespace ota {
namespace OTA_ISA {
namespace {

// Scores of n elements from `offset` on, all usable, to the censuses.
template <typename Acc>
void take_censuses(const Tile& tile, int64_t offset, int n, Strip<Acc>& x) {
    for (int64_t at = offset; has_censuses(tile) && at < offset + n; at += kStrip) {
        go_to(tile, at, x);
        load_base(tile, x);
        share_scores(tile, x);
        for (int t = 0; t < tile.n_experts; ++t) {
            if (tile.experts[t].census == nullptr) continue;
            if (tile.words.score != Score::spread) find_edits(tile, t, x);
            alignas(64) float used[kStrip];
            use(find_scores(tile, t, x), nullptr, kStrip, used);
            take_census(used, tile.experts[t], kStrip);
        }
    }
}

// Merges as many strips as there are up to `end`, or a span, from `offset` on. Returns their elements: 0 where they have to
// go through all steps.
template <typename Acc>
int merge_span(InRegisters quick, bool common, const Merge<Acc>& m, int64_t offset, int64_t end, Waiting& waiting) {
    const int64_t left = (end - offset) / kStrip * kStrip;
    const int n = left < kSpan ? static_cast<int>(left) : kSpan;
    if (quick == nullptr || n == 0) return 0;
    if (!quick(m.args, offset, n, m.stats, waiting)) return 0;
    if (!common) take_censuses(m.args.tile, offset, n, m.x);
    return n;
}

// Undecided elements.

// What a merge keeps for its undecided elements: tiles of candidates, as they are and with closed brackets.
struct Resolver {
    Alone alone;      // none where any words are resolved in one way
    int64_t resolved;  // candidates; those after them are known to stay
    Tile open, closed;
    int64_t index[kStrip];
    uint8_t merged[kStrip * sizeof(double)];
};

// What is known of each of at most kStrip undecided elements. brackets: how many hold its score; expert, step: whose it
// is where it is one, and how far it lies above the lowest; stays: a candidate, no alternative.
struct Undecided {
    alignas(64) int32_t brackets[kStrip] = {}, expert[kStrip] = {}, keepers[kStrip] = {}, usable[kStrip];
    alignas(64) int32_t kept[kStrip] = {};  // by somebody, as it was merged
    uint32_t step[kStrip] = {};
    int32_t stays[kStrip];
};

// The scores of candidates: x.edits[t] becomes them as they are counted, x.keep[t] whether the expert keeps the element
// as it was merged and counted.
template <typename Acc>
void look(const Tile& tile, bool bad, Strip<Acc>& x, Undecided& u) {
    std::memcpy(u.usable, x.ones, sizeof(u.usable));
    share_scores(tile, x);
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        alignas(64) int32_t usable[kStrip];
        std::memcpy(usable, x.ones, sizeof(usable));
        if (bad) find_usable(tile, t, x, usable);
        if (tile.words.score != Score::spread) find_edits(tile, t, x);
        const float* s = find_scores(tile, t, x);
        select(tile, t, s, x);
        alignas(64) float used[kStrip];
        use(s, usable, x.n, used);
        std::memcpy(x.edits[t], used, sizeof(used));
        const uint32_t lowest = bit_cast<uint32_t>(e.threshold);
        for (int j = 0; j < x.n; ++j) {
            const uint32_t above = bit_cast<uint32_t>(used[j]) - lowest;
            const int32_t inside = above < e.span ? -1 : 0;
            u.brackets[j] -= inside;
            u.expert[j] = inside ? t : u.expert[j];
            u.step[j] = inside ? above : u.step[j];
            u.keepers[j] -= x.keep[t][j] & ~inside;
            u.usable[j] &= usable[j];
            u.kept[j] |= x.keep[t][j];
            if (tile.numbers.repair) x.keep[t][j] &= usable[j];
        }
    }
}

// The steps of candidate number j, whose scores are x.edits.
template <typename Acc>
void list_steps(const Tile& tile, int j, const Strip<Acc>& x, Candidates& c) {
    for (int t = 0; t < tile.n_experts; ++t) {
        const uint32_t step = bit_cast<uint32_t>(x.edits[t][j]) - bit_cast<uint32_t>(tile.experts[t].threshold);
        if (step < tile.experts[t].span) c.steps[t][c.n_steps[t]++] = step;
    }
}

// Counts m candidates from `from` on nowhere but in `reached`, and splits them: those that wait for one expert alone
// (nearly all) become its alternatives, a fifth of the size; the others stay.
template <typename Acc>
void resolve(const MergeArgs& args, int64_t from, int m, Strip<Acc>& x, Resolver& r, MergeStats& stats) {
    const Tile& tile = args.tile;
    Candidates& c = *args.candidates;
    point_at(tile, c, from, m, r.index, r.open);
    point_at(tile, c, from, m, r.index, r.closed);
    const MergeArgs without{r.closed, r.merged, args.out_dtype, nullptr};
    MergeStats found;
    go_to(r.open, 0, x);
    merge_strip(Merge<Acc>{without, found, x, false});
    bool bad = found.base.count > 0;
    for (int t = 0; t < tile.n_experts; ++t) bad |= found.weights[t].count + found.curvature[t].count > 0;
    const Acc limit = static_cast<Acc>(largest_finite(args.out_dtype));
    Undecided u;
    const bool all_stay = r.alone != nullptr || tile.n > kFlag;
    for (int j = 0; j < m; ++j) u.stays[j] = std::fabs(x.numerator[j]) <= limit && !all_stay ? 0 : -1;
    look(r.open, bad, x, u);
    const int size = item_size(args.out_dtype);
    for (int j = 0; j < m; ++j) {
        const bool finite = is_stored_finite(args, c.index[from + j]);
        u.stays[j] |= u.brackets[j] != 1 || !u.usable[j] || !finite ? -1 : 0;
        stats.overflow -= finite ? 0 : 1;
        stats.unkept -= u.kept[j] ? 0 : 1;
        stats.repaired -= tile.numbers.repair && !u.usable[j] ? 1 : 0;
    }
    for (int t = 0; t < tile.n_experts; ++t) {
        int32_t taken = 0;
        for (int j = 0; j < m; ++j) taken -= (u.stays[j] | (u.expert[j] == t ? -1 : 0)) & x.keep[t][j];
        stats.kept[t] -= taken;
        stats.reached[t] += taken;
    }
    for (int j = 0; j < m; ++j) {
        if (u.stays[j]) {
            move(tile, c, from + j, c.count++);
            list_steps(tile, j, x, c);
            continue;
        }
        Alternatives& a = c.alternatives[u.expert[j]];
        a.index[a.count] = c.index[from + j] | (u.keepers[j] ? 0u : 1u << 31);
        a.steps[a.count] = u.step[j];
        std::memcpy(a.merged + size * a.count++, r.merged + size * j, static_cast<size_t>(size));
    }
}

// All that wait, or as many as are worth it.
template <typename Acc>
void resolve(const MergeArgs& args, Waiting& waiting, bool all, Strip<Acc>& x, Resolver& r, MergeStats& stats) {
    Candidates& c = *args.candidates;
    if (!all && waiting.count < Waiting::kMany) return;
    for (int first = 0; first < waiting.count; first += kStrip) {
        const int m = waiting.count - first < kStrip ? waiting.count - first : kStrip;
        const int64_t from = c.count;
        append(args.tile, waiting.at + first, m, c);
        if (r.alone != nullptr) c.count = from + r.alone(args, from, m, stats);
    }
    waiting.count = 0;
    const int64_t end = c.count;
    if (!all && r.alone != nullptr && end - r.resolved < Waiting::kMany) return;
    c.count = r.resolved;  // those that stay move up
    for (int64_t from = c.count; from < end; from += kStrip)
        resolve(args, from, static_cast<int>(end - from < kStrip ? end - from : kStrip), x, r, stats);
    r.resolved = c.count;
}

// A stretch of packs whose edits are all added: only those that are kept are looked at, everything else is the base.
// Returns its end; `offset` where some input may not be usable.
template <typename Acc>
int64_t merge_packed(Stretches& stretches, const Merge<Acc>& m, int64_t offset) {
    if constexpr (std::is_same<Acc, float>::value) {
        const Tile& tile = m.args.tile;
        alignas(64) float numerator[kStretch];
        const int64_t end = stretches.add(offset, numerator, m.stats);
        Suspicions found;
        found.look(numerator, static_cast<int>(end - offset), Ahead(), [](float sum) { return suspicion(sum); });
        bool usable = !found.any();
        const int64_t overflow = m.stats.overflow, unkept = m.stats.unkept;
        int64_t at = offset;
        for (; usable && at < end; at += m.x.n) {
            NonFinite base;
            go_to(tile, at, m.x);
            load_base(tile, m.x);
            usable = !count_unusable_base(m.x, base);
            if (!usable) break;
            std::memcpy(m.x.numerator, numerator + (at - offset), sizeof(float) * static_cast<size_t>(m.x.n));
            finish_plain(m);
        }
        if (usable) return end;
        stretches.back();
        m.stats.overflow = overflow, m.stats.unkept = unkept;
        for (int t = 0; t < tile.n_experts; ++t) m.stats.kept[t] -= at - offset;
    }
    return offset;
}

template <typename Acc>
void merge_tile(const MergeArgs& given, MergeStats& stats) {
    Stretches stretches(given.tile);
    const MergeArgs args{stretches.tile(), given.out, given.out_dtype, given.candidates, given.sums};
    const Tile& tile = args.tile;
    const bool open = args.candidates != nullptr && has_spans(tile);
    const bool packed = std::is_same<Acc, float>::value && stretches.are_alone() && !open &&
                        args.sums.new_numerator == nullptr && is_plain(tile);
    int64_t end = packed ? 0 : stretches.next(0, stats);
    Strip<Acc> x;
    prepare(tile, x);
    const Ranked ranked(tile, 0, tile.n_experts, x);
    InRegisters quick = salient(args, open);
    const bool common = quick != nullptr;
    if (quick == nullptr) quick = blocks(args);
    if (args.sums.new_numerator != nullptr) quick = nullptr;
    const Merge<Acc> m{args, stats, x, open};
    Waiting waiting;
    Resolver* resolver = nullptr;
    if (open) {
        resolver = new Resolver{common ? alone(args) : nullptr, 0, tile, tile, {}, {}};
        close_brackets(resolver->closed);
    }
    int64_t offset = 0, retry = 0;  // where registers are tried again
    while (offset < tile.n) {
        if (offset == end) {
            if (open) resolve(args, waiting, true, x, *resolver, stats);
            if (packed) {
                end = merge_packed(stretches, m, offset);
                if (end > offset) {
                    offset = end;
                    continue;
                }
            }
            end = stretches.next(offset, stats);
        }
        const int merged = offset >= retry ? merge_span(quick, common, m, offset, end, waiting) : 0;
        if (merged == 0) {
            if (offset >= retry) retry = offset + kSpan;
            go_to(tile, offset, x);
            merge_strip(m);
            if (open) waiting.add(x.waits, offset, x.n);
        }
        offset += merged > 0 ? merged : x.n;
        if (open) resolve(args, waiting, false, x, *resolver, stats);
    }
    if (open) resolve(args, waiting, true, x, *resolver, stats);
    delete resolver;
    for (int t = 0; t < tile.n_experts; ++t) stats.reached[t] += stats.kept[t];
}

}  // namespace

void merge(const MergeArgs& args, MergeStats& stats) {
    if (args.out_dtype == DType::f32 || args.out_dtype == DType::f64)
        merge_tile<double>(args, stats);
    else
        merge_tile<float>(args, stats);
}

}  // namespace OTA_ISA
}  // namespace ota
