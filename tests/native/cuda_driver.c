/* A CUDA driver without a device: it accepts what the launch seam of the CUDA backend asks of it, and writes each call
   as a line into the file that CUDA_DRIVER_LOG names. Everything else is a function that this driver does not have. */

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_FOUND = 500 };

static void note(const char* form, ...) {
  FILE* file = fopen(getenv("CUDA_DRIVER_LOG"), "a");
  va_list arguments;
  va_start(arguments, form);
  vfprintf(file, form, arguments);
  va_end(arguments);
  fclose(file);
}

int cuInit(unsigned flags) {
  return flags;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}

int cuCtxGetCurrent(void** context) {
  *context = (void*)0x10;
  return SUCCESS;
}

int cuLibraryLoadData(void** library, const void* code, int* a, void** b, unsigned c, int* d, void** e, unsigned f) {
  note("load %.3s\n", (const char*)code + 1); /* \x7f E L F */
  *library = (void*)0x20;
  return SUCCESS;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  note("get %s from %p\n", name, library);
  *kernel = (void*)0x30;
  return SUCCESS;
}

int cuLibraryUnload(void* library) {
  return library ? SUCCESS : NOT_FOUND;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  note("set %d to %d of %p on %d\n", attribute, value, kernel, device);
  return SUCCESS;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  note("launch %p on %p, grid %u %u %u, block %u %u %u, shared %u, first word %llx, extra %d\n", function, stream, gx,
       gy, gz, bx, by, bz, shared, *(unsigned long long*)parameters[0], extra != NULL);
  return SUCCESS;
}

/* NVRTC asks for the driver's private tables, and does without. */
int cuGetExportTable(const void** table, const void* id) {
  *table = NULL;
  return id ? NOT_FOUND : SUCCESS;
}

int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
  static const struct {
    const char* name;
    void* function;
  } known[] = {
      {"cuInit", cuInit},
      {"cuDriverGetVersion", cuDriverGetVersion},
      {"cuCtxGetCurrent", cuCtxGetCurrent},
      {"cuLibraryLoadData", cuLibraryLoadData},
      {"cuLibraryGetKernel", cuLibraryGetKernel},
      {"cuLibraryUnload", cuLibraryUnload},
      {"cuKernelSetAttribute", cuKernelSetAttribute},
      {"cuLaunchKernel", cuLaunchKernel},
      {"cuGetProcAddress", cuGetProcAddress_v2},
      {"cuGetProcAddress_v2", cuGetProcAddress_v2},
  };
  (void)version, (void)flags, (void)status;
  *function = NULL;
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
    if (strcmp(symbol, known[i].name) == 0) *function = known[i].function;
  return *function ? SUCCESS : NOT_FOUND;
}
