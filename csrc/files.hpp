// Few elements of large files: asked for before they are read, overwritten without copying the rest.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#if defined(__linux__)
#include <sys/vfs.h>
#endif
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "lists.hpp"
#include "windows.hpp"

namespace ota {

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
