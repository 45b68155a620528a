/*
 * hello-c: the least a service can be. It greets whoever its input names.
 *
 *     gcc -static -O2 -o hello-c hello.c
 */
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    /* argv: "service", namespace, service, method, then the caller's own arguments. */
    const char *method = argc > 3 ? argv[3] : "greet";

    /* The input, to its end. It isn't a string: there is no zero byte after it. */
    char name[1024];
    size_t length = fread(name, 1, sizeof name, stdin);
    while (length > 0 && name[length - 1] == '\n')
        length--;
    if (length == 0) {
        /* Standard error goes into the report; the exit status says that it failed. */
        fprintf(stderr, "hello-c: whom am I to greet? The input is empty\n");
        return 1;
    }

    /* Standard output is the answer. */
    const char *greeting = strcmp(method, "part") == 0 ? "Goodbye" : "Hello";
    printf("%s, %.*s!\n", greeting, (int)length, name);
    return 0;
}
