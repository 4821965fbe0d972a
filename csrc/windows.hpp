// Runs of neighbouring elements, read from a file without mapping its pages. For any instruction set: static, and
// without templates of the library, so that each has code of its own.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

namespace ota {

// All that lies between the first and the last of some runs.
struct Window {
    int64_t begin, size;
};

static inline Window window_of(const int64_t* starts, int64_t runs, int64_t length) {
    int64_t first = starts[0], last = starts[0];
    for (int64_t i = 1; i < runs; ++i) {
        first = starts[i] < first ? starts[i] : first;
        last = starts[i] > last ? starts[i] : last;
    }
    return {first, last + length - first};
}

// Elements of `size` bytes from number `begin` on. False where the file ends too early or the disk fails.
static inline bool read_elements(const FilePlace& file, int64_t size, const Window& window, uint8_t* out) {
    int64_t bytes = size * window.size, position = file.offset + size * window.begin;
    while (bytes > 0) {  // file systems over a network may return less, and stop for a signal
        const ssize_t read = pread(file.fd, out, static_cast<size_t>(bytes), position);
        if (read < 0 && errno == EINTR) continue;
        if (read <= 0) return false;
        bytes -= read, position += read, out += read;
    }
    return true;
}

// `count` runs of `length` elements of `size` bytes, one after the other, `together` with one read. False as
// above.
static inline bool read_runs(const FilePlace& file, int64_t size, const int64_t* starts, int64_t count, int64_t length,
                             int64_t together, uint8_t* out) {
    const int64_t run_bytes = size * length;
    if (together == 1) {
        for (int64_t i = 0; i < count; ++i, out += run_bytes)
            if (!read_elements(file, size, {starts[i], length}, out)) return false;
        return true;
    }
    uint8_t* bytes = nullptr;
    bool whole = true;
    for (int64_t i = 0; i < count && whole; i += together) {
        const Window window = window_of(starts + i, together, length);
        auto* room = static_cast<uint8_t*>(std::realloc(bytes, static_cast<size_t>(size * window.size)));
        whole = room != nullptr && read_elements(file, size, window, room);
        bytes = room != nullptr ? room : bytes;
        for (int64_t j = i; j < i + together && whole; ++j, out += run_bytes)
            std::memcpy(out, bytes + size * (starts[j] - window.begin), static_cast<size_t>(run_bytes));
    }
    std::free(bytes);
    return whole;
}

}  // namespace ota
