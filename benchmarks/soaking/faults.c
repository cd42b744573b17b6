/* Injects faults into a program: file operations that fail, are slow or are its last ones, and a wrong clock.
 *
 *     cc -O2 -shared -fPIC benchmarks/soaking/faults.c -o faults.so -ldl
 *     LD_PRELOAD=$PWD/faults.so FAULT_ROOT=/tmp/registry FAULT_KILL_AT=17 compress registry ...
 *
 * Operations below FAULT_ROOT that change files are counted from 1, for each process on its own.
 *   FAULT_KILL_AT=N           SIGKILL before operation N; a write has written half of its bytes
 *   FAULT_FULL_AT=N           from operation N on, FAULT_FULL_FOR=M of them fail with ENOSPC; the first write takes half
 *   FAULT_SLOW_US=N           every operation waits up to N microseconds
 *   FAULT_CLOCK=SECONDS       the clock is off by so much; it jumps by as much again after every FAULT_CLOCK_EVERY readings
 *   FAULT_FIRED=FILE          is created once a fault was injected
 * Without FAULT_ROOT and FAULT_CLOCK nothing changes. The variables are read at every call, so that a forked process may
 * set its own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))

static long operations;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static long number(const char *name) {
  const char *value = getenv(name);
  return value ? atol(value) : 0;
}

static void fired(void) {
  const char *file = getenv("FAULT_FIRED");
  if (file) syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, file, O_CREAT | O_WRONLY, 0600));
}

static int is_below_root(const char *path) {
  const char *root = getenv("FAULT_ROOT");
  char absolute[2 * PATH_MAX], folder[PATH_MAX];
  if (!root || !path) return 0;
  if (path[0] != '/' && getcwd(folder, sizeof folder)) {
    snprintf(absolute, sizeof absolute, "%s/%s", folder, path);
    path = absolute;
  }
  return !strncmp(path, root, strlen(root));
}

static int is_file_below_root(int descriptor) {
  char link[64], path[PATH_MAX];
  if (!getenv("FAULT_ROOT")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_below_root(path);
}

/* Count an operation. Returns 0 if it goes on, 1 if it fails, 2 if it is the first that fails, 3 before the end. */
static int fault(int counts) {
  if (!counts) return 0;
  long index = __sync_add_and_fetch(&operations, 1);
  long slow = number("FAULT_SLOW_US"), kill_at = number("FAULT_KILL_AT"), full_at = number("FAULT_FULL_AT");
  if (slow) {
    fired();
    usleep(random() % slow);
  }
  if (kill_at && index == kill_at) return 3;
  if (full_at && index >= full_at && index < full_at + number("FAULT_FULL_FOR")) {
    fired();
    errno = ENOSPC;
    return index == full_at ? 2 : 1;
  }
  return 0;
}

static void end(void) {
  fired();
  syscall(SYS_kill, getpid(), SIGKILL);
}

#define FAIL_OR(call, counts)         \
  int outcome = fault(counts);        \
  if (outcome == 3) end();            \
  if (outcome) return errno = ENOSPC, -1; \
  return call

ssize_t write(int descriptor, const void *content, size_t size) {
  int outcome = fault(is_file_below_root(descriptor));
  if (outcome >= 2 && size > 1) {
    ssize_t written = REAL(write)(descriptor, content, size / 2);
    if (outcome == 3) end();
    return written;
  }
  if (outcome == 3) end();
  if (outcome) return errno = ENOSPC, -1;
  return REAL(write)(descriptor, content, size);
}
ssize_t pwrite64(int descriptor, const void *content, size_t size, off64_t offset) {
  FAIL_OR(REAL(pwrite64)(descriptor, content, size, offset), is_file_below_root(descriptor));
}
ssize_t pwrite(int descriptor, const void *content, size_t size, off_t offset) {
  FAIL_OR(REAL(pwrite)(descriptor, content, size, offset), is_file_below_root(descriptor));
}
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  FAIL_OR(REAL(sendfile)(out, in, offset, size), is_file_below_root(out));
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
  FAIL_OR(REAL(sendfile64)(out, in, offset, size), is_file_below_root(out));
}
int fsync(int descriptor) { FAIL_OR(REAL(fsync)(descriptor), is_file_below_root(descriptor)); }
int fdatasync(int descriptor) { FAIL_OR(REAL(fdatasync)(descriptor), is_file_below_root(descriptor)); }
int rename(const char *from, const char *to) { FAIL_OR(REAL(rename)(from, to), is_below_root(to)); }
int link(const char *from, const char *to) { FAIL_OR(REAL(link)(from, to), is_below_root(to)); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  FAIL_OR(REAL(linkat)(a, from, b, to, flags), is_below_root(to));
}
int symlink(const char *from, const char *to) { FAIL_OR(REAL(symlink)(from, to), is_below_root(to)); }
int mkdir(const char *path, mode_t mode) { FAIL_OR(REAL(mkdir)(path, mode), is_below_root(path)); }

/* Room is never needed for these: a process may only end before them. */
#define END_OR(call, counts)             \
  if (fault(counts) == 3) end();         \
  return call
int unlink(const char *path) { END_OR(REAL(unlink)(path), is_below_root(path)); }
int rmdir(const char *path) { END_OR(REAL(rmdir)(path), is_below_root(path)); }
int unlinkat(int folder, const char *path, int flags) {
  END_OR(REAL(unlinkat)(folder, path, flags), folder == AT_FDCWD ? is_below_root(path) : is_file_below_root(folder));
}
int truncate(const char *path, off_t size) { END_OR(REAL(truncate)(path, size), is_below_root(path)); }
int ftruncate(int descriptor, off_t size) { END_OR(REAL(ftruncate)(descriptor, size), is_file_below_root(descriptor)); }
int ftruncate64(int descriptor, off64_t size) {
  END_OR(REAL(ftruncate64)(descriptor, size), is_file_below_root(descriptor));
}
int truncate64(const char *path, off64_t size) { END_OR(REAL(truncate64)(path, size), is_below_root(path)); }

#define OPEN                                                            \
  int is_new = (flags & O_CREAT) && is_below_root(path), outcome = fault(is_new); \
  va_list rest;                                                         \
  va_start(rest, flags);                                                \
  mode_t mode = va_arg(rest, mode_t);                                   \
  va_end(rest);                                                         \
  if (outcome == 3) end();                                              \
  if (outcome) return errno = ENOSPC, -1;                               \
  return syscall(SYS_openat, AT_FDCWD, path, flags | O_LARGEFILE, mode)
int open(const char *path, int flags, ...) { OPEN; }
int open64(const char *path, int flags, ...) { OPEN; }

static time_t jump(void) {
  static long readings;
  long seconds = number("FAULT_CLOCK"), every = number("FAULT_CLOCK_EVERY");
  if (!seconds) return 0;
  long reading = __sync_fetch_and_add(&readings, 1);
  if (!reading) fired();
  return seconds * (every ? 1 + reading / every % 2 : 1);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = syscall(SYS_clock_gettime, clock, now);
  if (clock == CLOCK_REALTIME && !code) now->tv_sec += jump();
  return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int code = syscall(SYS_gettimeofday, now, zone);
  if (!code) now->tv_sec += jump();
  return code;
}
time_t time(time_t *now) {
  struct timespec present;
  clock_gettime(CLOCK_REALTIME, &present);
  if (now) *now = present.tv_sec;
  return present.tv_sec;
}
