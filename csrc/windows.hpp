// Runs of neighbouring elements, read from a file without mapping its pages. For any instruction set.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.hpp"

namespace ota {

// All that lies between the first and the last of some runs, in bytes.
struct Window {
    int64_t begin, size;
};

// static: each instruction set has code of its own.
static inline Window window_of(const int64_t* starts, int64_t runs, int64_t run_bytes) {
    int64_t first = starts[0], last = starts[0];
    for (int64_t i = 1; i < runs; ++i) {
        first = starts[i] < first ? starts[i] : first;
        last = starts[i] > last ? starts[i] : last;
    }
    return {first, last + run_bytes - first};
}

// `count` runs of `length` elements of `size` bytes, one after the other, `together` with one read. False where the
// file ends too early.
static inline bool read_runs(const FilePlace& file, int64_t size, const int64_t* starts, int64_t count, int64_t length,
                             int64_t together, uint8_t* out) {
    const int64_t run_bytes = size * length;
    const auto read = [&](uint8_t* to, int64_t bytes, int64_t first) {
        return pread(file.fd, to, static_cast<size_t>(bytes), file.offset + first) == bytes;
    };
    std::vector<uint8_t> bytes;
    std::vector<int64_t> places(static_cast<size_t>(together));
    for (int64_t i = 0; i < count; i += together, out += together * run_bytes) {
        for (int64_t j = 0; j < together; ++j) places[j] = size * starts[i + j];
        if (together == 1) {
            if (!read(out, run_bytes, places[0])) return false;
            continue;
        }
        const Window window = window_of(places.data(), together, run_bytes);
        bytes.resize(static_cast<size_t>(window.size));
        if (!read(bytes.data(), window.size, window.begin)) return false;
        for (int64_t j = 0; j < together; ++j)
            std::memcpy(out + j * run_bytes, bytes.data() + (places[j] - window.begin), static_cast<size_t>(run_bytes));
    }
    return true;
}

}  // namespace ota
