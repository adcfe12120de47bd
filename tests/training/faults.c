/* Makes the k-th call that changes the disk fail, from fault_arm() on; loaded with LD_PRELOAD. With `sticky` every
   call after it that needs space fails too, as on a disk that stays full. Descriptors 0 to 2 are let be. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/types.h>

static int left = -1, number, keeps, hits;

void fault_arm(int k, int error, int sticky) { left = k; number = error; keeps = sticky; hits = 0; }
int fault_hits(void) { left = -1; return hits; }

static int fails(int needs_space) {
  if (left < 0) return 0;
  if (left > 0) { left--; return 0; }
  if (hits && (!keeps || !needs_space)) return 0;
  hits++;
  errno = number;
  return 1;
}

ssize_t write(int file, const void *data, size_t count) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "write");
  return file > 2 && fails(1) ? -1 : real(file, data, count);
}

int fsync(int file) {
  static int (*real)(int);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "fsync");
  return fails(1) ? -1 : real(file);
}

int rename(const char *from, const char *to) {
  static int (*real)(const char *, const char *);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "rename");
  return fails(0) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
  static int (*real)(const char *, mode_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "mkdir");
  return fails(1) ? -1 : real(path, mode);
}

int unlinkat(int folder, const char *path, int flags) {
  static int (*real)(int, const char *, int);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "unlinkat");
  return fails(0) ? -1 : real(folder, path, flags);
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
  int (*real)(const char *, int, ...);
  *(void **)&real = dlsym(RTLD_NEXT, name);
  return (flags & O_CREAT) && fails(1) ? -1 : real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened("open64", path, flags, mode);
}
