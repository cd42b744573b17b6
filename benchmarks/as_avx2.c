/* Limits a program and its child processes to AVX2 (no AVX-512, VNNI, bfloat16 or AMX), without slowing it down.
 *
 *     cc -O2 -shared -fPIC benchmarks/as_avx2.c -o as_avx2.so
 *     LD_PRELOAD=$PWD/as_avx2.so compress run recipes/minilm-int8.yaml
 *
 * ONNX Runtime and torch then select the kernels for x86 processors from before 2020, because CPUID and /proc/cpuinfo do
 * not report the newer extensions. Linux can make the CPUID instruction fault if the processor supports it (Intel since
 * Ivy Bridge, AMD since Zen 2; not under every hypervisor). The signal handler below then returns the filtered CPUID
 * values. If faulting is not supported, a message is printed and nothing is limited.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static void answer(int sig, siginfo_t *info, void *context) {
  greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *at = (const unsigned char *)regs[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) { /* a fault of the program itself, not of CPUID */
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  unsigned leaf = regs[REG_RAX], sub = regs[REG_RCX], a, b, c, d;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __cpuid_count(leaf, sub, a, b, c, d);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 7 && sub == 0) {
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
  } else if (leaf == 7 && sub == 1) {
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
    d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10));
  }
  regs[REG_RAX] = a; regs[REG_RBX] = b; regs[REG_RCX] = c; regs[REG_RDX] = d; regs[REG_RIP] += 2;
}

static int filtered(void) {
  static char text[1 << 20], kept[1 << 20];
  int from = syscall(SYS_openat, AT_FDCWD, "/proc/cpuinfo", O_RDONLY), size = 0, n;
  while ((n = read(from, text + size, sizeof text - 1 - size)) > 0) size += n;
  close(from); text[size] = 0; kept[0] = 0; char *end = kept;
  for (char *p = text; *p;) {
    size_t word = strcspn(p, " \n\t");
    int drop = !strncmp(p, "avx512", 6) || !strncmp(p, "avx_vnni", 8) || !strncmp(p, "amx_", 4);
    if (!drop) { memcpy(end, p, word); end += word; }
    p += word;
    if (*p) *end++ = *p++;
  }
  int fd = memfd_create("cpuinfo", 0);
  if (write(fd, kept, end - kept) < 0) abort();
  lseek(fd, 0, SEEK_SET);
  return fd;
}

#define HOOK(name) \
  int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    if (!strcmp(path, "/proc/cpuinfo")) return filtered(); \
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode); }
HOOK(open)
HOOK(open64)
FILE *fopen64(const char *path, const char *how) {
  if (!strcmp(path, "/proc/cpuinfo")) return fdopen(filtered(), "r");
  FILE *(*real)(const char *, const char *) = dlsym(RTLD_NEXT, "fopen64");
  return real(path, how);
}
FILE *fopen(const char *path, const char *how) { return fopen64(path, how); }

__attribute__((constructor)) static void begin(void) {
  struct sigaction how = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  sigaction(SIGSEGV, &how, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) fputs("as_avx2: CPUID does not fault here; nothing is held\n", stderr);
}
