// The workers behind parallel_for.

#include "common.h"
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace outrider {
namespace {

// How long an idle worker looks for work before it sleeps. Longer than the gap between two steps: to wake it takes as long
// as a loop, more in a virtual machine. It lets others have the core after every glance.
constexpr auto kAttentive = std::chrono::milliseconds(2);
constexpr int kLooksPerGlance = 2000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

std::atomic<uint64_t> num_forks{0};

void count_fork() { num_forks.fetch_add(1, std::memory_order_relaxed); }

// One loop at a time. `gate_` holds how many workers are inside, and whether others may still enter: a worker that sees
// it shut has missed this loop, and must not touch it.
class Workers {
  public:
    ~Workers() {
        {
            const std::lock_guard lock(mutex_);
            ends_ = true;
            round_.fetch_add(1);
        }
        called_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    void run(int32_t num_threads, int64_t num_items, LoopBody body, void* context) {
        grow(num_threads - 1);
        body_ = body;
        context_ = context;
        deal(num_threads, num_items);
        gate_.store(0, std::memory_order_release);
        call();
        take_items(0);
        gate_.fetch_or(kShut, std::memory_order_acq_rel);
        for (int looks = 1; gate_.load(std::memory_order_acquire) != kShut; ++looks) {
            relax();
            // Whoever is inside may be off its core: let it have this one.
            if (looks % 4096 == 0) std::this_thread::yield();
        }
    }

  private:
    static constexpr uint64_t kShut = uint64_t{1} << 32;
    static constexpr int32_t kNoSeat = -1;

    void grow(int32_t num_workers) {
        while (static_cast<int32_t>(workers_.size()) < num_workers) {
            workers_.emplace_back([this, seen = round_.load()] { work(seen); });
        }
    }

    // A new round begins. The lock is taken only if somebody sleeps; a worker counts itself among the sleepers before it
    // looks at the round for the last time, so it either sees this one or is counted here.
    void call() {
        round_.fetch_add(1, std::memory_order_seq_cst);
        if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
            { const std::lock_guard lock(mutex_); }
            called_.notify_all();
        }
    }

    void work(uint64_t seen) {
        while (true) {
            await_round(seen);
            seen = round_.load(std::memory_order_acquire);
            if (ends_) return;
            const int32_t seat = enter();
            if (seat == kNoSeat) continue;
            take_items(seat);
            gate_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    void await_round(uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + kAttentive;
        do {
            for (int look = 0; look < kLooksPerGlance; ++look) {
                if (round_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
            std::this_thread::yield();
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock lock(mutex_);
        num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
        called_.wait(lock, [&] { return round_.load(std::memory_order_seq_cst) != seen; });
        num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }

    // A seat of the loop under way, counted in the gate; kNoSeat where it is too late or all are taken.
    int32_t enter() {
        uint64_t inside = gate_.load(std::memory_order_acquire);
        do {
            if (inside & kShut) return kNoSeat;
        } while (!gate_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel));
        const int32_t seat = next_seat_.fetch_add(1, std::memory_order_relaxed);
        if (seat < num_shares_) return seat;
        gate_.fetch_sub(1, std::memory_order_acq_rel);
        return kNoSeat;
    }

    // Contiguous shares, so that a thread streams its own part of a large array.
    void deal(int32_t num_threads, int64_t num_items) {
        if (num_threads > num_allocated_) {
            shares_ = std::make_unique<Share[]>(num_threads);
            num_allocated_ = num_threads;
        }
        num_shares_ = num_threads;
        for (int64_t i = 0; i < num_threads; ++i) {
            shares_[i].next.store(i * num_items / num_threads, std::memory_order_relaxed);
            shares_[i].end = (i + 1) * num_items / num_threads;
        }
        next_seat_.store(1, std::memory_order_relaxed);
    }

    // One's own share first, then what others have not come to.
    void take_items(int32_t seat) {
        for (int32_t i = 0; i < num_shares_; ++i) {
            Share& share = shares_[(seat + i) % num_shares_];
            for (int64_t item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
                body_(context_, item);
            }
        }
    }

    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    LoopBody body_ = nullptr;
    void* context_ = nullptr;
    std::unique_ptr<Share[]> shares_;
    int32_t num_allocated_ = 0;
    int32_t num_shares_ = 0;
    bool ends_ = false;  // written before, and read after, a change of the round
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable called_;
    alignas(64) std::atomic<uint64_t> gate_{kShut};
    std::atomic<int32_t> next_seat_{0};
    alignas(64) std::atomic<uint64_t> round_{0};
    std::atomic<int32_t> num_sleeping_{0};
};

// The calling thread's workers. After a fork no thread but the caller lives on, so theirs can be neither used nor joined:
// they are left behind, and new ones are made when there is work.
class OwnWorkers {
  public:
    ~OwnWorkers() {
        if (is_of_this_process()) delete workers_;
    }

    Workers& get() {
        if (workers_ == nullptr || !is_of_this_process()) {
            workers_ = new Workers;
            forks_ = num_forks.load(std::memory_order_relaxed);
        }
        return *workers_;
    }

  private:
    bool is_of_this_process() const { return forks_ == num_forks.load(std::memory_order_relaxed); }

    Workers* workers_ = nullptr;
    uint64_t forks_ = 0;
};

Workers& own_workers() {
    static const int registered = pthread_atfork(nullptr, nullptr, count_fork);
    (void)registered;
    thread_local OwnWorkers workers;
    return workers.get();
}

}  // namespace

void run_loop(int32_t num_threads, int64_t num_items, LoopBody body, void* context) {
    own_workers().run(num_threads, num_items, body, context);
}

}  // namespace outrider

// For tests: adds up i * i over [0, num_items) by parallel_for.
OUTRIDER_EXPORT int64_t outrider_sum_of_squares(int32_t num_threads, int64_t num_items) {
    std::atomic<int64_t> sum{0};
    outrider::parallel_for(num_threads, num_items, [&](int64_t item) { sum += item * item; });
    return sum;
}
