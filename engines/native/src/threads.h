// Who computes what: a loop whose items are taken by whichever thread is free.
//
// Not OpenMP, whose loops end only when every thread of the team has come by. On a machine whose cores are busy with
// something else (a gateway beside the engine, a test run) a thread may wait a scheduler's slice for its turn, some
// milliseconds, and a step has some two hundred loops. Here the caller takes items as well and never waits for a thread
// that has not begun: one that comes too late finds nothing left. On an idle machine both are equally fast.
//
// Each calling thread has workers of its own, so that two engines in one process do not wait for each other. Which
// thread takes an item is left open, so what an item computes must not depend on it.

#pragma once

#include <cstdint>

namespace outrider {

using LoopBody = void (*)(void* context, int64_t item);

// Calls body(context, item) for all items in [0, num_items), by the caller and at most num_threads - 1 workers; returns
// when all are done.
void run_loop(int32_t num_threads, int64_t num_items, LoopBody body, void* context);

// run_loop with a function object. Items should take a microsecond at least.
template <typename Body>
void parallel_for(int32_t num_threads, int64_t num_items, Body body) {
    if (num_threads <= 1 || num_items <= 1) {
        for (int64_t item = 0; item < num_items; ++item) body(item);
        return;
    }
    run_loop(
        num_threads, num_items, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

}  // namespace outrider
