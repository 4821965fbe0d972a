// Places in large arrays and files: elements written there, runs read from there, files asked for and overwritten. For
// any instruction set: static where a kernel uses it, and without templates of the library, so that each has its own.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#if defined(__linux__)
#include <sys/vfs.h>
#endif
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

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

// Whether an open file has no disk to be read from.
inline bool is_in_memory(int fd) {
#if defined(__linux__)
    constexpr unsigned kTmpfs = 0x01021994, kRamfs = 0x858458f6;
    struct statfs system;
    if (fstatfs(fd, &system) != 0) return false;
    const auto kind = static_cast<unsigned>(system.f_type);
    return kind == kTmpfs || kind == kRamfs;
#else
    static_cast<void>(fd);
    return false;
#endif
}

// Has windows of runs that begin at `starts` read from the disk, without waiting: many at a time.
inline void ask_for_runs(int fd, const int64_t* starts, int64_t count, int64_t run_bytes, int64_t together) {
#if defined(POSIX_FADV_WILLNEED)
    for (int64_t i = 0; i < count; i += together) {
        const Window window = window_of(starts + i, together, run_bytes);
        static_cast<void>(posix_fadvise(fd, window.begin, window.size, POSIX_FADV_WILLNEED));
    }
#else
    static_cast<void>(fd), static_cast<void>(starts), static_cast<void>(count), static_cast<void>(run_bytes);
    static_cast<void>(together);
#endif
}

// Free bytes of a disk that may need new blocks for what is overwritten (copy on write): with less, a page that
// is written through a map could become a bus error.
constexpr uint64_t kSafeToMap = 1u << 30;

// Scatters into `bytes` bytes of a file, which were written, from byte `begin` on, through a map: half the time of
// reading and writing them; and begins to write them to the disk. False where that cannot be done.
inline bool scatter_in_file(int fd, int64_t begin, int64_t bytes, const uint32_t* positions, int64_t m,
                            const uint8_t* elements, int size) {
#if defined(__linux__)
#if !defined(MADV_POPULATE_WRITE)
    constexpr int MADV_POPULATE_WRITE = 23;  // since Linux 5.14
#endif
    struct statvfs disk;
    if (fstatvfs(fd, &disk) != 0 || uint64_t{disk.f_bavail} * disk.f_frsize < kSafeToMap) return false;
    const int64_t before = begin % sysconf(_SC_PAGESIZE), length = before + bytes;
    void* pages = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, begin - before);
    if (pages == MAP_FAILED) return false;
    const bool writable = madvise(pages, length, MADV_POPULATE_WRITE) == 0;  // fails where a write would
    if (writable) scatter(static_cast<uint8_t*>(pages) + before, positions, m, elements, size);
    munmap(pages, length);
    if (writable) static_cast<void>(sync_file_range(fd, begin, bytes, SYNC_FILE_RANGE_WRITE));
    return writable;
#else
    static_cast<void>(fd), static_cast<void>(begin), static_cast<void>(bytes), static_cast<void>(positions);
    static_cast<void>(m), static_cast<void>(elements), static_cast<void>(size);
    return false;
#endif
}

}  // namespace ota
