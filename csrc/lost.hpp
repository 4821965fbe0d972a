// Reads of mapped files that fail: the file has become shorter, or its disk gave an error. The system then sends
// SIGBUS, which would end the process. While somebody watches, zeros are mapped in the place of a page of a guarded
// range, and the range counts as lost before they can be seen: who has read a range asks afterwards.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
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

// Begins to watch, or ends it; as often as wanted.
inline void watch(bool on) {
#if defined(__linux__)
    const std::lock_guard<std::mutex> lock(guarding);
    watching.fetch_add(on ? 1 : -1);
    if (!on) return;
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
#else
    static_cast<void>(on);
#endif
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
