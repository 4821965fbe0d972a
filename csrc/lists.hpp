// Lists of places in large arrays, and what to read, count or write there. For any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace ota {

template <typename T>
void scatter(uint8_t* data, const uint32_t* positions, int64_t m, const uint8_t* elements) {
    constexpr int64_t kAhead = 32;  // each is likely to be a cache miss
    for (int64_t j = 0; j < m; ++j) {
        if (j + kAhead < m) __builtin_prefetch(data + sizeof(T) * positions[j + kAhead], 1);
        std::memcpy(data + sizeof(T) * positions[j], elements + sizeof(T) * j, sizeof(T));
    }
}

// data[positions] = elements, of 2, 4 or 8 bytes each.
inline void scatter(uint8_t* data, const uint32_t* positions, int64_t m, const uint8_t* elements, int size) {
    if (size == 2) return scatter<uint16_t>(data, positions, m, elements);
    if (size == 4) return scatter<uint32_t>(data, positions, m, elements);
    scatter<uint64_t>(data, positions, m, elements);
}

// Size: of a run in bytes, where it is known; else 0. static: each instruction set has code of its own.
template <int64_t Size>
static void copy_runs(const uint8_t* data, int64_t size, const int64_t* starts, int64_t count, int64_t left,
                      int64_t length, uint8_t* out) {
    const int64_t run_bytes = Size ? Size : size * length;
    constexpr int64_t kAhead = 16;  // each is a cache miss, or two: many at a time
    for (int64_t i = 0; i < count; ++i) {
        if (i + kAhead < left) {
            const uint8_t* next = data + size * starts[i + kAhead];
            __builtin_prefetch(next);
            __builtin_prefetch(next + run_bytes - 1);
        }
        std::memcpy(out + run_bytes * i, data + size * starts[i], static_cast<size_t>(run_bytes));
    }
}

// Runs of `length` elements of `size` bytes that begin at `starts`, one after the other. left >= count: how many
// starts there are, to be fetched ahead.
static inline void copy_runs(const uint8_t* data, int64_t size, const int64_t* starts, int64_t count, int64_t left,
                             int64_t length, uint8_t* out) {
    if (size * length == 32) return copy_runs<32>(data, size, starts, count, left, length, out);
    if (size * length == 64) return copy_runs<64>(data, size, starts, count, left, length, out);
    copy_runs<0>(data, size, starts, count, left, length, out);
}

// Alternatives of one expert (kernels.hpp), and the first step that keeps them.
struct Below {
    int64_t count;
    const uint32_t *index, *steps;  // from a file, not aligned
    const uint8_t* merged;
    uint32_t limit;
};

// Those below the limit: their positions and values go to `at` and `values`. How many they are; of these, `alone`
// are kept by no other expert.
template <typename T>
int64_t below(const Below& x, uint32_t* at, uint8_t* values, int64_t& alone) {
    int64_t n = 0;
    for (int64_t j = 0; j < x.count; ++j) {
        uint32_t position, step;
        std::memcpy(&position, x.index + j, sizeof(position));
        std::memcpy(&step, x.steps + j, sizeof(step));
        at[n] = position & 0x7fffffffu;
        std::memcpy(values + sizeof(T) * n, x.merged + sizeof(T) * j, sizeof(T));
        const int64_t below = step < x.limit ? 1 : 0;
        n += below;
        alone += below & (position >> 31);
    }
    return n;
}

// Values of 2, 4 or 8 bytes.
inline int64_t below(const Below& x, int size, uint32_t* at, uint8_t* values, int64_t& alone) {
    if (size == 2) return below<uint16_t>(x, at, values, alone);
    if (size == 4) return below<uint32_t>(x, at, values, alone);
    return below<uint64_t>(x, at, values, alone);
}

}  // namespace ota
