// Reads of mapped files that fail: the file has become shorter, or its disk gave an error. The system then sends
// SIGBUS, which would end the process. While somebody watches, zeros are mapped in the place of a page of a guarded
// range, and the range counts as lost before they can be seen: who has read a range asks afterwards. Where nobody
// does, a command ends with one line that names the file (`end_where_lost`).
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace ota {

struct Guarded {
    std::atomic<uintptr_t> begin{0}, end{0};  // 0: free
    std::atomic<bool> lost{false};
    int64_t id = 0;
    Guarded* next = nullptr;
};

// Ranges are never taken out of the list, only used again: a signal may come while it is read.
inline std::atomic<Guarded*> guarded{nullptr};
inline std::atomic<int64_t> watching{0}, losses{0};
inline struct sigaction before_lost;
inline uintptr_t lost_page_size = 0;

inline std::atomic<bool> ends_where_lost{false}, ending{false};

// The path of the file that is mapped at an address; what it writes to. Calls only what a signal's handler may.
inline const char* mapped_file(uintptr_t address, char* line, size_t size) {
    const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    char read_ahead[512];
    size_t filled = 0;
    for (ssize_t count; maps >= 0 && (count = read(maps, read_ahead, sizeof read_ahead)) > 0;) {
        for (ssize_t i = 0; i < count; ++i) {
            if (read_ahead[i] != '\n') {
                if (filled + 1 < size) line[filled++] = read_ahead[i];
                continue;
            }
            line[filled] = 0;  // begin-end rights offset device inode path
            filled = 0;
            char* end = nullptr;
            const uintptr_t begin = strtoull(line, &end, 16);
            const char* path = strchr(line, '/');
            if (address < begin || *end != '-' || address >= strtoull(end + 1, nullptr, 16)) continue;
            close(maps);
            return path == nullptr ? "a mapped file" : path;
        }
    }
    if (maps >= 0) close(maps);
    return "a mapped file";
}

// One line, and exit code 1.
[[noreturn]] inline void end_process(uintptr_t address) {
    static char line[1 << 13];
    while (ending.exchange(true)) pause();  // another thread says it
    const char* path = mapped_file(address, line, sizeof line);
    const char* fact = ": is lost: it has become shorter, or its disk is full or has failed\n";
    for (const char* text : {"error: ", path, fact}) {
        if (write(STDERR_FILENO, text, strlen(text)) < 0) break;
    }
    _exit(1);
}

inline void on_bus_error(int number, siginfo_t* info, void* context) {
    const int saved = errno;
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    for (Guarded* range = guarded.load(); watching.load() > 0 && range != nullptr; range = range->next) {
        if (address < range->begin.load() || address >= range->end.load()) continue;
        range->lost.store(true);
        losses.fetch_add(1);
        void* page = reinterpret_cast<void*>(address - address % lost_page_size);
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap(page, lost_page_size, PROT_READ, flags, -1, 0) == MAP_FAILED) break;
        errno = saved;
        return;
    }
    if (ends_where_lost.load()) end_process(address);
    if (before_lost.sa_flags & SA_SIGINFO) {
        before_lost.sa_sigaction(number, info, context);
    } else if (before_lost.sa_handler != SIG_DFL && before_lost.sa_handler != SIG_IGN) {
        before_lost.sa_handler(number);
    } else {
        signal(SIGBUS, SIG_DFL);  // the access is tried again, and ends the process
    }
    errno = saved;
}

inline std::mutex guarding;

// Guards a range of a mapped file; the number by which it is released and named.
inline int64_t guard(uintptr_t begin, uintptr_t bytes) {
    const std::lock_guard<std::mutex> lock(guarding);
    static int64_t last = 0;
    Guarded* range = guarded.load();
    while (range != nullptr && range->end.load() != 0) range = range->next;
    const bool is_new = range == nullptr;
    if (is_new) range = new Guarded;
    range->id = ++last;
    range->lost.store(false);
    range->begin.store(begin);
    range->end.store(begin + bytes);
    if (is_new) {
        range->next = guarded.load();
        guarded.store(range);
    }
    return range->id;
}

inline void unguard(int64_t id) {
    const std::lock_guard<std::mutex> lock(guarding);
    for (Guarded* range = guarded.load(); range != nullptr; range = range->next) {
        if (range->id != id) continue;
        range->end.store(0);
        range->begin.store(0);
        range->lost.store(false);
        range->id = 0;
    }
}

// Has on_bus_error called, if it is not already.
inline void handle() {
#if defined(__linux__)
    lost_page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction now;
    sigaction(SIGBUS, nullptr, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return;
    before_lost = now;
    struct sigaction own = {};
    own.sa_sigaction = on_bus_error;
    own.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&own.sa_mask);
    sigaction(SIGBUS, &own, nullptr);
#endif
}

// Begins to watch, or ends it; as often as wanted.
inline void watch(bool on) {
    const std::lock_guard<std::mutex> lock(guarding);
    watching.fetch_add(on ? 1 : -1);
    if (on) handle();
}

// From now on a failing read that nobody watches ends the process, whatever file it is of.
inline void end_where_lost() {
    const std::lock_guard<std::mutex> lock(guarding);
    ends_where_lost.store(true);
    handle();
}

// The guarded ranges of which a read has failed.
inline std::vector<int64_t> lost() {
    std::vector<int64_t> found;
    if (losses.load() == 0) return found;
    const std::lock_guard<std::mutex> lock(guarding);
    for (const Guarded* range = guarded.load(); range != nullptr; range = range->next) {
        if (range->lost.load()) found.push_back(range->id);
    }
    return found;
}

}  // namespace ota
