// Random numbers of ota_kernels/tensors/random.py, bit for bit: Philox 4x32-10 by (seed, tensor, expert, element), and
// the masks that go by an edit's rank in its row.
#pragma once

#include <cstdlib>

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

    // The words of n groups of four elements from number `group` on, one row of kStrip for each place in a group.
    void words(uint64_t group, int n, uint32_t (*out)[kStrip]) const {
        for (int i = 0; i < n; ++i) {
            const uint64_t g = group + static_cast<uint64_t>(i);
            uint32_t c0 = static_cast<uint32_t>(g), c1 = static_cast<uint32_t>(g >> 32), c2 = expert, c3 = high;
            uint32_t k0 = key[0], k1 = key[1];
            for (int round = 0; round < 10; ++round) {
                const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
                c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
                c1 = static_cast<uint32_t>(second);
                c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
                c3 = static_cast<uint32_t>(first);
                k0 += 0x9E3779B9u;
                k1 += 0xBB67AE85u;
            }
            out[0][i] = c0, out[1][i] = c1, out[2][i] = c2, out[3][i] = c3;
        }
    }
};

// u of n elements, from 0 to below 1.
inline void uniform(const Philox& philox, const Place& place, int n, float* u) {
    uint32_t words[4][kStrip];
    const auto of = [](uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; };
    if (place.index != nullptr) {
        for (int i = 0; i < n; ++i) {
            philox.words(static_cast<uint64_t>(place.index[i]) >> 2, 1, words);
            u[i] = of(words[place.index[i] & 3][0]);
        }
        return;
    }
    const auto first = static_cast<uint64_t>(place.first);
    const int begin = static_cast<int>(first & 3), groups = (begin + n + 3) / 4;
    for (int done = 0; done < groups; done += kStrip) {  // n + 3 elements may take one group more than a strip has
        philox.words((first >> 2) + static_cast<uint64_t>(done), groups - done < kStrip ? groups - done : kStrip, words);
        for (int i = done * 4 < begin ? 0 : done * 4 - begin; i < n && (i + begin) / 4 - done < kStrip; ++i)
            u[i] = of(words[(i + begin) & 3][(i + begin) / 4 - done]);
    }
}

// Orders `n` bits (below 2^31) ascending, equals by their place: `order`, with as much room again.
inline void sort_places(const uint32_t* bits, int64_t n, uint32_t* order, uint32_t* room) {
    constexpr int kDigit = 11;
    for (int64_t i = 0; i < n; ++i) room[i] = static_cast<uint32_t>(i);
    for (int shift = 0; shift < 33; shift += kDigit) {
        uint32_t begin[(1 << kDigit) + 1] = {};
        for (int64_t i = 0; i < n; ++i) ++begin[(bits[i] >> shift & ((1u << kDigit) - 1)) + 1];
        for (int i = 0; i < 1 << kDigit; ++i) begin[i + 1] += begin[i];
        for (int64_t i = 0; i < n; ++i) order[begin[bits[room[i]] >> shift & ((1u << kDigit) - 1)]++] = room[i];
        uint32_t* swap = order;
        order = room, room = swap;
    }
}

// p of an edit of this rank in a row of `length`.
inline float probability_of_rank(const Expert& e, int64_t rank, int64_t length) {
    if (length == 1) return static_cast<float>(e.probability);
    const double share = 2 * e.spread * static_cast<double>(rank) / static_cast<double>(length - 1);
    return static_cast<float>((e.probability - e.spread) + share);
}

}  // namespace OTA_ISA
}  // namespace ota
