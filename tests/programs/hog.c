/* Takes more than its share, in each way a tenant has: `hog WAY [ARG...]`.
 * Says how far it got; whether that was too far is the test's to judge. */
#include "probe.h"
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>

enum { MIB = 1 << 20 };

static char block[MIB];

/* Writes `bytes` to `fd`; tells how many went through before an error. */
static unsigned long long flood(int fd, unsigned long long bytes)
{
	unsigned long long done = 0;
	memset(block, 'x', sizeof block);
	while (done < bytes) {
		size_t length = bytes - done < sizeof block ? bytes - done : sizeof block;
		ssize_t n = write(fd, block, length);
		if (n < 0)
			break;
		done += n;
	}
	return done;
}

static void touch_memory(unsigned long long bytes)
{
	char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		fact("mmap", "%s", error_name());
		return;
	}
	for (unsigned long long at = 0; at < bytes; at += 4096)
		memory[at] = 1;
	fact("mmap", "%llu", bytes);
}

static void fill_file(const char *key, int fd, unsigned long long bytes)
{
	unsigned long long done = fd < 0 ? 0 : flood(fd, bytes);
	fact(key, "%llu %s", done, done < bytes ? error_name() : "ok");
}

/* The first process lives on and ends well; a child of it takes the memory. */
static void child_memory(unsigned long long bytes)
{
	int status;
	pid_t child = fork();
	if (child == 0) {
		touch_memory(bytes);
		_exit(0);
	}
	waitpid(child, &status, 0);
	fact("child", "%s", WIFSIGNALED(status) ? "killed" : "ended");
}

/* Reads a file through, which fills the page cache and nothing else. */
static void read_through(const char *path)
{
	unsigned long long total = 0;
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	while ((n = read(fd, block, sizeof block)) > 0)
		total += n;
	fact("read", "%llu", total);
}

static void spread_cpu(int children, unsigned long long milliseconds)
{
	for (int i = 0; i < children; i++)
		if (fork() == 0) {
			burn_ms(milliseconds);
			_exit(0);
		}
	while (wait(NULL) > 0)
		;
	fact("burnt", "%llu", children * milliseconds);
}

static void fork_bomb(unsigned long long most)
{
	unsigned long long made = 0;
	while (made < most) {
		pid_t child = fork();
		if (child == 0)
			forever();
		if (child < 0)
			break;
		made++;
	}
	fact("forked", "%llu %s", made, made < most ? error_name() : "ok");
	/* Outside, nothing of it stays either. */
	signal(SIGTERM, SIG_IGN);
	kill(0, SIGTERM);
	while (wait(NULL) > 0)
		;
}

static void many_files(const char *directory, unsigned long long most)
{
	char path[PATH_MAX];
	unsigned long long made = 0;
	for (; made < most; made++) {
		snprintf(path, sizeof path, "%s/%llu", directory, made);
		int fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
		if (fd < 0)
			break;
		close(fd);
	}
	fact("files", "%llu %s", made, made < most ? error_name() : "ok");
}

static void many_descriptors(unsigned long long most)
{
	unsigned long long made = 0;
	while (made < most && dup(0) >= 0)
		made++;
	fact("descriptors", "%llu %s", made, made < most ? error_name() : "ok");
}

static void sparse_file(const char *path, unsigned long long bytes)
{
	signal(SIGXFSZ, SIG_IGN);
	int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
	fact("sparse", "%s", outcome(fd < 0 ? fd : ftruncate(fd, bytes)));
	unlink(path);
}

/* Leaves a process behind that holds nothing of its parent's: another session,
 * another parent, no descriptor. `name` is how the test finds it. */
static void survivor(const char *name, int keep_output)
{
	int ready[2];
	char byte;
	if (pipe(ready) < 0)
		misuse("no pipe");
	if (fork() == 0) {
		setsid();
		if (fork() == 0) {
			prctl(PR_SET_NAME, name);
			signal(SIGTERM, SIG_IGN);
			signal(SIGHUP, SIG_IGN);
			if (!keep_output)
				for (int fd = 0; fd < 3; fd++)
					close(fd);
			if (write(ready[1], "x", 1) == 1)
				close(ready[1]);
			forever();
		}
		_exit(0);
	}
	close(ready[1]);
	fact("survivor", "%s", read(ready[0], &byte, 1) == 1 ? "running" : "failed");
}

/* Many children dump their core at once. */
static void core_storm(int children)
{
	int dumped = 0, status;
	for (int i = 0; i < children; i++)
		if (fork() == 0) {
			signal(SIGABRT, SIG_DFL);
			abort();
		}
	while (wait(&status) > 0)
		dumped += WIFSIGNALED(status) && WCOREDUMP(status);
	fact("cores", "%d", dumped);
}

static void threads(unsigned long long most)
{
	unsigned long long made = 0;
	static char stacks[4096][8192] __attribute__((aligned(16)));
	const int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
	while (made < most && made < 4096 &&
	       clone((int (*)(void *))forever, stacks[made] + sizeof *stacks, flags, NULL) >= 0)
		made++;
	fact("threads", "%llu %s", made, made < most ? error_name() : "ok");
	exit(0);
}

static int is(const char *way, const char *name)
{
	return strcmp(way, name) == 0;
}

/* With MFD_NOEXEC_SEAL, which old headers lack and kernels before 6.3 don't know. */
static int sealed_memfd(void)
{
	int fd = memfd_create("hog", 8);

	return fd >= 0 ? fd : memfd_create("hog", 0);
}

int main(int argc, char **argv)
{
	if (argc < 2)
		misuse("hog WAY [ARG...]");
	const char *way = argv[1], *text = argv[2];

	if (is(way, "mmap"))
		touch_memory(number(text));
	else if (is(way, "tmpfs"))
		fill_file("tmpfs", open(argv[3] ? argv[3] : "/tmp/.hog", O_CREAT | O_WRONLY | O_TRUNC, 0600), number(text));
	else if (is(way, "memfd"))
		fill_file("memfd", sealed_memfd(), number(text));
	else if (is(way, "child-memory"))
		child_memory(number(text));
	else if (is(way, "child-memory-then-exit")) {
		child_memory(number(text));
		return 9;
	} else if (is(way, "child-memory-then-wait")) { /* under a name that tells that it waits */
		child_memory(number(text));
		prctl(PR_SET_NAME, argv[3]);
		forever();
	} else if (is(way, "read"))
		read_through(text);
	else if (is(way, "cpu"))
		spread_cpu((int)number(text), number(argv[3]));
	else if (is(way, "forks"))
		fork_bomb(number(text));
	else if (is(way, "threads"))
		threads(number(text));
	else if (is(way, "stdout"))
		flood(1, number(text));
	else if (is(way, "stderr"))
		flood(2, number(text));
	else if (is(way, "both"))
		for (unsigned long long left = number(text); left > 0; left--)
			flood(1, 1024), flood(2, 1024);
	else if (is(way, "files"))
		many_files(argv[3] ? argv[3] : "/tmp", number(text));
	else if (is(way, "descriptors"))
		many_descriptors(number(text));
	else if (is(way, "sparse"))
		sparse_file(argv[3] ? argv[3] : "/tmp/.sparse", number(text));
	else if (is(way, "survivor"))
		survivor(text, 0);
	else if (is(way, "survivor-with-output"))
		survivor(text, 1);
	else if (is(way, "cores"))
		core_storm((int)number(text));
	else if (is(way, "stop"))
		raise(SIGSTOP);
	else if (is(way, "stubborn")) { /* every signal that can be ignored is */
		for (int i = 1; i <= SIGRTMAX; i++)
			signal(i, SIG_IGN);
		fact("stubborn", "yes");
		for (;;)
			sleep_ms(1000);
	} else
		misuse("no such way: %s", way);
	return 0;
}
