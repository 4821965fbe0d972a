// Random numbers of ota_kernels/tensors/random.py, bit for bit: Philox 4x32-10 by (seed, tensor, expert, element), and
// the masks that go by an edit's rank in its row.
#pragma once

#include <cstdlib>

#include "lanes.hpp"
#include "stages.hpp"

namespace ota {
namespace OTA_ISA {

// Where the elements of a strip lie in their tensor.
struct Place {
    int64_t first = 0;               // flat index of the first one
    const int64_t* index = nullptr;  // of each, where they were gathered
    int64_t columns = 1;

    int64_t at(int i) const { return index != nullptr ? index[i] : first + i; }
};

// Calls step(begin, end, row, column) for what n elements have of each row.
template <typename Step>
inline void by_rows(const Place& place, int n, Step step) {
    for (int begin = 0, end; begin < n; begin = end) {
        const int64_t row = place.at(begin) / place.columns, column = place.at(begin) % place.columns;
        const int64_t left = place.index != nullptr ? 1 : place.columns - column;
        end = left < n - begin ? begin + static_cast<int>(left) : n;
        step(begin, end, row, column);
    }
}

struct Philox {
    uint32_t key[2], expert, high;  // high: half of the name's hash

    Philox(const Numbers& x, uint32_t expert)
        : key{static_cast<uint32_t>(x.seed), static_cast<uint32_t>(x.name_hash)},
          expert(expert),
          high(static_cast<uint32_t>(x.name_hash >> 32)) {}

    // The words of the four elements of a group.
    void words(uint64_t group, uint32_t* out) const {
        uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = expert, c3 = high;
        uint32_t k0 = key[0], k1 = key[1];
        for (int round = 0; round < kRounds; ++round, k0 += kWeyl[0], k1 += kWeyl[1]) {
            const uint64_t first = uint64_t{kTimes[0]} * c0, second = uint64_t{kTimes[1]} * c2;
            c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(second);
            c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(first);
        }
        out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
    }

#if defined(OTA_LANES)
    // The words of the elements of many groups, a vector after the other; the chains of N pairs of vectors overlap.
    static constexpr int kPair = OTA_LANES / 2;  // groups

    template <int N>
    void words(uint64_t group, lanes::Bits* out) const {
        using namespace lanes;
        // Words are the low halves of 64-bit lanes; what is in the high ones is of no matter.
        Bits c0[N], c1[N], c2[N], c3[N];
        for (int n = 0; n < N; ++n) {
            c0[n] = count_from(group + static_cast<uint64_t>(n * kPair)), c1[n] = high_half(c0[n]);
            c2[n] = all(expert), c3[n] = all(high);
        }
        uint32_t k0 = key[0], k1 = key[1];
#pragma GCC unroll 10
        for (int round = 0; round < kRounds; ++round, k0 += kWeyl[0], k1 += kWeyl[1])
            for (int n = 0; n < N; ++n) {
                const Bits first = product(all(kTimes[0]), c0[n]), second = product(all(kTimes[1]), c2[n]);
                c0[n] = differ(high_half(second), c1[n], all(k0)), c1[n] = second;
                c2[n] = differ(high_half(first), c3[n], all(k1)), c3[n] = first;
            }
        for (int n = 0; n < N; ++n) in_turn(c0[n], c1[n], c2[n], c3[n], out + 2 * n);
    }
#endif

private:
    static constexpr int kRounds = 10;
    static constexpr uint32_t kTimes[2] = {0xD2511F53u, 0xCD9E8D57u}, kWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
};

// u of n elements, from 0 to below 1.
inline void uniform(const Philox& philox, const Place& place, int n, float* u) {
    const auto of = [](uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; };
    if (place.index != nullptr) {
        for (int i = 0; i < n; ++i) {
            uint32_t words[4];
            philox.words(static_cast<uint64_t>(place.index[i]) >> 2, words);
            u[i] = of(words[place.index[i] & 3]);
        }
        return;
    }
    const auto first = static_cast<uint64_t>(place.first);
    const int begin = static_cast<int>(first & 3), end = begin + n;
    alignas(64) uint32_t words[kStrip + kChunk];
#if defined(OTA_LANES)
    constexpr int kTogether = 2, kStep = kTogether * 2 * OTA_LANES;
    static_assert(kChunk >= kStep, "what is drawn beyond the strip");
    for (int i = 0; i < end; i += kStep) {
        lanes::Bits drawn[kTogether * 2];
        philox.words<kTogether>((first >> 2) + static_cast<uint64_t>(i / 4), drawn);
        for (int v = 0; v < kTogether * 2; ++v) lanes::store(words + i + v * OTA_LANES, drawn[v]);
    }
#else
    for (int i = 0; i < end; i += 4) philox.words((first >> 2) + static_cast<uint64_t>(i / 4), words + i);
#endif
    for (int i = 0; i < n; ++i) u[i] = of(words[begin + i]);
}

// The places of `n` bits in ascending order, equals by their place: in one of two rooms for them.
inline const uint32_t* sort_places(const uint32_t* bits, int64_t n, uint32_t* room, uint32_t* other) {
    constexpr int kDigit = 8, kDigits = 32 / kDigit, kBins = 1 << kDigit;
    uint32_t begin[kDigits][kBins] = {};
    for (int64_t i = 0; i < n; ++i)
        for (int digit = 0; digit < kDigits; ++digit) ++begin[digit][bits[i] >> digit * kDigit & (kBins - 1)];
    const uint32_t* order = nullptr;
    for (int digit = 0; digit < kDigits; ++digit) {
        const auto bin = [&](uint32_t place) { return bits[place] >> digit * kDigit & (kBins - 1); };
        uint32_t* first = begin[digit];
        // Of edits in 16 bits, a digit or two is the same for all.
        if (n > 0 && first[bin(0)] == n && (order != nullptr || digit + 1 < kDigits)) continue;
        uint32_t before = 0;
        for (int i = 0; i < kBins; ++i) {
            const uint32_t here = first[i];
            first[i] = before, before += here;
        }
        if (order == nullptr)
            for (int64_t i = 0; i < n; ++i) room[first[bin(static_cast<uint32_t>(i))]++] = static_cast<uint32_t>(i);
        else
            for (int64_t i = 0; i < n; ++i) room[first[bin(order[i])]++] = order[i];
        order = room, room = other, other = const_cast<uint32_t*>(order);
    }
    return order;
}

// p of an edit of this rank in a row of `length`.
inline float probability_of_rank(const Expert& e, int64_t rank, int64_t length) {
    if (length == 1) return static_cast<float>(e.probability);
    const double share = 2 * e.spread * static_cast<double>(rank) / static_cast<double>(length - 1);
    return static_cast<float>((e.probability - e.spread) + share);
}

}  // namespace OTA_ISA
}  // namespace ota
