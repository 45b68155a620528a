/*
 * trouble-c: a service that misbehaves. The method says how; the report says what became of it.
 *
 *     gcc -static -O2 -o trouble-c trouble.c
 *
 *     memory    takes memory without end      OUT_OF_MEMORY
 *     sleep     never ends                    TIMED_OUT
 *     spin      computes without end          CPU_TIME_EXCEEDED
 *     flood     prints without end            OUTPUT_EXCEEDED
 *     fork      starts processes without end  EXITED; the policy's `pids` stops it
 *     unshare   asks for namespaces           SYSCALL_DENIED
 *     crash     dies of a signal of its own   SIGNALLED
 *     fail      exits with 7                  EXITED, and a status that isn't OK
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void take_memory(void)
{
    for (;;) {
        char *block = malloc(1 << 20);
        if (block)
            memset(block, 1, 1 << 20); /* only what is written to is really taken */
    }
}

static void flood(void)
{
    char line[4096];
    memset(line, 'x', sizeof line);
    while (write(STDOUT_FILENO, line, sizeof line) > 0)
        ;
}

/* What is left when the first process ends is ended with it. */
static void start_processes(void)
{
    int started = 0;
    for (;;) {
        pid_t child = fork();
        if (child == 0)
            for (;;)
                pause();
        if (child < 0)
            break;
        started++;
    }
    printf("%d processes, then: %s\n", started, strerror(errno));
}

int main(int argc, char **argv)
{
    const char *method = argc > 3 ? argv[3] : "";

    if (strcmp(method, "memory") == 0)
        take_memory();
    else if (strcmp(method, "sleep") == 0)
        for (;;)
            pause();
    else if (strcmp(method, "spin") == 0)
        for (volatile unsigned long turns = 0;; turns++)
            ;
    else if (strcmp(method, "flood") == 0)
        flood();
    else if (strcmp(method, "fork") == 0)
        start_processes();
    else if (strcmp(method, "unshare") == 0)
        unshare(CLONE_NEWUSER | CLONE_NEWNET);
    else if (strcmp(method, "crash") == 0)
        raise(SIGSEGV);
    else if (strcmp(method, "fail") == 0)
        return 7;
    else {
        fprintf(stderr, "trouble-c: no method '%s'\n", method);
        return 2;
    }
    return 0;
}
