/*
 * The threads of one context. A launch hands every thread the same function and its own number; kernels split their rows
 * by it. Kernels follow each other within nanoseconds, so a worker spins a little before it sleeps.
 *
 * Sleeping loses no wake-up: the sleeper raises its flag, then looks at the state; the other side changes the state, then
 * looks at the flag. Both in sequentially consistent order, so at least one of them sees the other.
 */
#define _POSIX_C_SOURCE 200809L

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "internal.h"

#define SPINS 2000 /* some 30 to 70 us on x86 */

typedef struct {
  pthread_t thread;
  hq_pool *pool;
  int task_id;
} worker;

struct hq_pool {
  horq_context *owner;
  int threads;
  int spins;
  int started; /* workers that exist */
  hq_task task; /* the launch: written before `launches` grows, read after */
  void *data;
  atomic_uint launches;
  atomic_int running;
  atomic_int failed;
  atomic_int stop;
  atomic_int sleeping; /* workers in `wake` */
  atomic_int waiting;  /* the caller in `done` */
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  pthread_cond_t done;
  worker workers[];
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void run_task(hq_pool *pool, int task_id) {
  hq_parallel_env env = {NULL, pool->threads};
  if (pool->task(task_id, &env, pool->data) != 0) atomic_store(&pool->failed, 1);
}

static void await_launch(hq_pool *pool, unsigned seen) {
  for (int i = 0; i < pool->spins; ++i) {
    if (atomic_load_explicit(&pool->launches, memory_order_acquire) != seen) return;
    relax();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_fetch_add(&pool->sleeping, 1);
  while (atomic_load(&pool->launches) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
  atomic_fetch_sub(&pool->sleeping, 1);
  pthread_mutex_unlock(&pool->mutex);
}

static void *work(void *argument) {
  worker *self = argument;
  hq_pool *pool = self->pool;
  if (hq_enter(pool->owner) != 0) atomic_store(&pool->failed, 1); /* only messages get lost */
  for (unsigned seen = 0;; ++seen) {
    await_launch(pool, seen);
    if (atomic_load(&pool->stop)) return NULL;
    run_task(pool, self->task_id);
    if (atomic_fetch_sub(&pool->running, 1) == 1 && atomic_load(&pool->waiting)) {
      pthread_mutex_lock(&pool->mutex);
      pthread_cond_signal(&pool->done);
      pthread_mutex_unlock(&pool->mutex);
    }
  }
}

static void announce(hq_pool *pool) {
  atomic_fetch_add(&pool->launches, 1);
  if (atomic_load(&pool->sleeping) > 0) {
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
  }
}

static void await_workers(hq_pool *pool) {
  for (int i = 0; i < pool->spins; ++i) {
    if (atomic_load_explicit(&pool->running, memory_order_acquire) == 0) return;
    relax();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_store(&pool->waiting, 1);
  while (atomic_load(&pool->running) > 0) pthread_cond_wait(&pool->done, &pool->mutex);
  atomic_store(&pool->waiting, 0);
  pthread_mutex_unlock(&pool->mutex);
}

int hq_pool_run(hq_pool *pool, hq_task task, void *data) {
  pool->task = task;
  pool->data = data;
  atomic_store(&pool->failed, 0);
  atomic_store(&pool->running, pool->threads - 1);
  announce(pool);
  run_task(pool, 0);
  await_workers(pool);
  return atomic_load(&pool->failed) ? -1 : 0;
}

/* Signals are the program's business: a worker takes none. */
static int start_workers(hq_pool *pool) {
  sigset_t all, before;
  sigfillset(&all);
  if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0) return HORQ_ERROR_THREADS;
  int status = HORQ_OK;
  for (int i = 0; i < pool->threads - 1 && status == HORQ_OK; ++i) {
    worker *next = &pool->workers[i];
    next->pool = pool;
    next->task_id = i + 1;
    if (pthread_create(&next->thread, NULL, work, next) == 0) {
      ++pool->started;
    } else {
      status = HORQ_ERROR_THREADS;
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return status;
}

int hq_pool_create(int threads, horq_context *owner, hq_pool **result) {
  hq_pool *pool = calloc(1, sizeof *pool + (size_t)(threads - 1) * sizeof pool->workers[0]);
  if (pool == NULL) return HORQ_ERROR_MEMORY;
  pool->owner = owner;
  pool->threads = threads;
  /* With fewer cores than threads, who spins takes the core from who works. */
  pool->spins = sysconf(_SC_NPROCESSORS_ONLN) >= threads ? SPINS : 0;
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->wake, NULL);
  pthread_cond_init(&pool->done, NULL);
  const int status = start_workers(pool);
  if (status != HORQ_OK) {
    hq_pool_destroy(pool);
    return status;
  }
  *result = pool;
  return HORQ_OK;
}

void hq_pool_destroy(hq_pool *pool) {
  if (pool == NULL) return;
  atomic_store(&pool->stop, 1);
  announce(pool);
  for (int i = 0; i < pool->started; ++i) pthread_join(pool->workers[i].thread, NULL);
  pthread_cond_destroy(&pool->done);
  pthread_cond_destroy(&pool->wake);
  pthread_mutex_destroy(&pool->mutex);
  free(pool);
}
