/* Says everything a program can see and change from where it stands, one
 * `key=value` per fact. Run outside first, it tells what there is to lose. */
#include "probe.h"
#include <dirent.h>
#include <linux/capability.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>

extern char **environ;

static void identity(void)
{
	uid_t r, e, s;
	getresuid(&r, &e, &s);
	fact("uid", "%u %u %u", r, e, s);
	getresgid(&r, &e, &s);
	fact("gid", "%u %u %u", r, e, s);

	gid_t groups[256];
	int count = getgroups(256, groups);
	fact("groups.count", "%d", count);
	for (int i = 0; i < count; i++)
		fact("group", "%u", groups[i]);

	/* Taking any other identity, root's first of all. */
	fact("setuid.0", "%s", outcome(syscall(SYS_setuid, 0)));
	fact("setgid.0", "%s", outcome(syscall(SYS_setgid, 0)));
	fact("setgroups.0", "%s", outcome(syscall(SYS_setgroups, 1, (gid_t[]){ 0 })));
}

static void capabilities(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = { 0 };
	fact("capget", "%s", outcome(syscall(SYS_capget, &header, data)));
	unsigned long long bounding = 0, ambient = 0;
	for (int cap = 0; cap < 64; cap++) {
		if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1)
			bounding |= 1ULL << cap;
		if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1)
			ambient |= 1ULL << cap;
	}
	fact("cap.effective", "%llx", (unsigned long long)data[1].effective << 32 | data[0].effective);
	fact("cap.permitted", "%llx", (unsigned long long)data[1].permitted << 32 | data[0].permitted);
	fact("cap.inheritable", "%llx",
	     (unsigned long long)data[1].inheritable << 32 | data[0].inheritable);
	fact("cap.bounding", "%llx", bounding);
	fact("cap.ambient", "%llx", ambient);
	fact("no_new_privs", "%d", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
	fact("seccomp", "%d", prctl(PR_GET_SECCOMP, 0, 0, 0, 0));
	fact("dumpable", "%d", prctl(PR_GET_DUMPABLE, 0, 0, 0, 0));
}

static void process(void)
{
	char cwd[PATH_MAX];
	fact("cwd", "%s", getcwd(cwd, sizeof cwd) ? cwd : error_name());
	fact("pid", "%d", getpid());
	fact("ppid", "%d", getppid());
	fact("sid.own", "%s", getsid(0) == getpid() ? "yes" : "no");
	fact("pgid.own", "%s", getpgid(0) == getpid() ? "yes" : "no");
	fact("tty", "%s", outcome(open("/dev/tty", O_RDWR | O_CLOEXEC)));
	mode_t mask = umask(0);
	umask(mask);
	fact("umask", "%03o", mask);

	sigset_t blocked;
	sigprocmask(SIG_SETMASK, NULL, &blocked);
	for (int number = 1; number <= SIGRTMAX; number++) {
		struct sigaction action;
		if (sigismember(&blocked, number) == 1)
			fact("signal.blocked", "%d", number);
		if (sigaction(number, NULL, &action) == 0 && action.sa_handler == SIG_IGN)
			fact("signal.ignored", "%d", number);
	}
	struct utsname uts;
	uname(&uts);
	fact("hostname", "%s", uts.nodename);
	fact("sethostname", "%s", outcome(sethostname(uts.nodename, strlen(uts.nodename))));
	fact("nice.raise", "%s", outcome(setpriority(PRIO_PROCESS, 0, -5)));
}

/* Every open descriptor and what it is; a directory among them is a way out. */
static void descriptors(void)
{
	struct stat status;
	int highest = 1 << 20;
	struct rlimit limit;
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_max < (rlim_t)highest)
		highest = limit.rlim_max + 4096; /* one may lie above the limit */
	for (int fd = 0; fd < highest; fd++)
		if (fcntl(fd, F_GETFD) >= 0) {
			fact("fd", "%d", fd);
			if (fstat(fd, &status) == 0)
				fact("fd.kind", "%d %s", fd,
				     S_ISDIR(status.st_mode) ? "directory" :
				     S_ISFIFO(status.st_mode) ? "pipe" :
				     S_ISSOCK(status.st_mode) ? "socket" :
				     S_ISCHR(status.st_mode) ? "device" : "file");
		}
}

static void limits(void)
{
	static const struct { const char *name; int resource; } all[] = {
		{ "core", RLIMIT_CORE }, { "nofile", RLIMIT_NOFILE }, { "fsize", RLIMIT_FSIZE },
		{ "nproc", RLIMIT_NPROC }, { "memlock", RLIMIT_MEMLOCK }, { "nice", RLIMIT_NICE },
		{ "rtprio", RLIMIT_RTPRIO }, { "msgqueue", RLIMIT_MSGQUEUE },
		{ "sigpending", RLIMIT_SIGPENDING },
	};
	char key[64];
	struct rlimit limit;
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		snprintf(key, sizeof key, "rlimit.%s", all[i].name);
		getrlimit(all[i].resource, &limit);
		fact(key, "%lld %lld", (long long)limit.rlim_cur, (long long)limit.rlim_max);
	}
	/* Lowering the core limit from 1 to 0 would arm a piped core handler again. */
	limit = (struct rlimit){ 0, 0 };
	fact("rlimit.core.set", "%s", outcome(setrlimit(RLIMIT_CORE, &limit)));
	fact("rlimit.core.prlimit", "%s",
	     outcome(syscall(SYS_prlimit64, 0, RLIMIT_CORE, (uint64_t[]){ 0, 1 }, NULL)));
	fact("rlimit.core.prlimit.self", "%s",
	     outcome(syscall(SYS_prlimit64, getpid(), RLIMIT_CORE, (uint64_t[]){ 0, 1 }, NULL)));
	getrlimit(RLIMIT_CORE, &limit);
	fact("rlimit.core.after", "%lld %lld", (long long)limit.rlim_cur, (long long)limit.rlim_max);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_max++;
	fact("rlimit.nofile.raise", "%s", outcome(setrlimit(RLIMIT_NOFILE, &limit)));
}

/* Tries to create in, rename in and remove from a directory, two levels deep. */
static void writable(const char *path, int depth)
{
	char name[PATH_MAX];
	snprintf(name, sizeof name, "%s/.probe", strcmp(path, "/") ? path : "");
	int fd = open(name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
	if (fd >= 0) {
		fact("writable", "%s", path);
		close(fd);
		unlink(name);
	}
	if (mkdir(name, 0700) == 0) {
		fact("mkdir", "%s", path);
		rmdir(name);
	}
	DIR *directory = depth > 0 ? opendir(path) : NULL;
	if (!directory)
		return;
	for (struct dirent *entry; (entry = readdir(directory));) {
		if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
			continue;
		snprintf(name, sizeof name, "%s/%s", strcmp(path, "/") ? path : "", entry->d_name);
		if (strcmp(name, "/proc"))
			writable(name, depth - 1);
	}
	closedir(directory);
}

static void root(void)
{
	DIR *directory = opendir("/");
	for (struct dirent *entry; directory && (entry = readdir(directory));)
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
			fact("root", "%s", entry->d_name);
	if (directory)
		closedir(directory);
	writable("/", 3);

	struct stat up, here;
	stat("/", &here);
	stat("/..", &up);
	fact("root.escape", "%s", here.st_ino == up.st_ino && here.st_dev == up.st_dev ? "no" : "yes");
	fact("chmod.root", "%s", outcome(chmod("/", 0777)));

	struct statvfs tmp;
	if (statvfs("/tmp", &tmp) == 0) {
		fact("tmp.bytes", "%llu", (unsigned long long)tmp.f_blocks * tmp.f_frsize);
		fact("tmp.inodes", "%llu", (unsigned long long)tmp.f_files);
		fact("tmp.noexec", "%s", tmp.f_flag & ST_NOEXEC ? "yes" : "no");
		fact("tmp.nosuid", "%s", tmp.f_flag & ST_NOSUID ? "yes" : "no");
		fact("tmp.nodev", "%s", tmp.f_flag & ST_NODEV ? "yes" : "no");
	} else
		fact("tmp.bytes", "%s", error_name());
}

/* /dev: each entry with its numbers, and whether it does what it should. */
static void devices(void)
{
	struct stat status;
	char path[PATH_MAX], bytes[16];
	DIR *directory = opendir("/dev");
	for (struct dirent *entry; directory && (entry = readdir(directory));) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		if (lstat(path, &status) == 0)
			fact("dev", "%s %c %u:%u", entry->d_name,
			     S_ISCHR(status.st_mode) ? 'c' : S_ISBLK(status.st_mode) ? 'b' :
			     S_ISLNK(status.st_mode) ? 'l' : S_ISDIR(status.st_mode) ? 'd' : '-',
			     major(status.st_rdev), minor(status.st_rdev));
	}
	if (directory)
		closedir(directory);
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	int full = open("/dev/full", O_WRONLY | O_CLOEXEC), urandom = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	fact("dev.null.write", "%s", outcome(write(null, "x", 1)));
	fact("dev.null.read", "%zd", read(null, bytes, 1));
	fact("dev.zero.read", "%zd", read(zero, bytes, sizeof bytes));
	fact("dev.full.write", "%s", outcome(write(full, "x", 1)));
	fact("dev.urandom.read", "%zd", read(urandom, bytes, sizeof bytes));
	fact("mknod.block", "%s", outcome(mknod("/tmp/.disk", S_IFBLK | 0600, makedev(254, 0))));
	fact("mknod.char", "%s", outcome(mknod("/tmp/.mem", S_IFCHR | 0600, makedev(1, 1))));
	unlink("/tmp/.disk");
	unlink("/tmp/.mem");
}

static void proc(void)
{
	static const char *const hidden[] = {
		"/proc/1", "/proc/1/cmdline", "/proc/1/mem", "/proc/1/root", "/proc/1/exe",
		"/proc/sys", "/proc/kcore", "/proc/keys", "/proc/cpuinfo", "/proc/sysrq-trigger",
		"/proc/sys/kernel/core_pattern", "/proc/kallsyms", "/proc/timer_list", "/proc/modules",
		"/sys", "/sys/fs/cgroup",
	};
	static const char *const fixed[] = {
		"/proc/self/uid_map", "/proc/self/gid_map", "/proc/self/setgroups", "/proc/self/mem",
		"/proc/self/oom_score_adj", "/proc/self/attr/exec", "/proc/self/comm",
		"/proc/self/coredump_filter",
	};
	char key[128];
	struct stat status;
	for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++) {
		snprintf(key, sizeof key, "see %s", hidden[i]);
		fact(key, "%s", outcome(lstat(hidden[i], &status)));
	}
	for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) {
		snprintf(key, sizeof key, "open-rw %s", fixed[i]);
		int fd = open(fixed[i], O_RDWR | O_CLOEXEC);
		fact(key, "%s", outcome(fd));
		if (fd >= 0)
			close(fd);
	}
	DIR *directory = opendir("/proc");
	for (struct dirent *entry; directory && (entry = readdir(directory));)
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) {
			if (atoi(entry->d_name) != getpid())
				fact("proc.entry", "%s", entry->d_name);
		}
	if (directory)
		closedir(directory);
}

/* The mount table: `mount=POINT FSTYPE per-mount,options super,options`. */
static void mounts(void)
{
	FILE *table = fopen("/proc/self/mountinfo", "re");
	char line[4096], point[1024], options[512], type[64], super[1024];
	while (table && fgets(line, sizeof line, table)) {
		char *tail = strstr(line, " - ");
		if (tail && sscanf(line, "%*d %*d %*s %*s %1023s %511s", point, options) == 2 &&
		    sscanf(tail, " - %63s %*s %1023s", type, super) == 2)
			fact("mount", "%s %s %s %s", point, type, options, super);
	}
	fact("mountinfo", "%s", table ? "ok" : error_name());
	if (table)
		fclose(table);
}

static void namespaces(void)
{
	static const char *const names[] = { "user", "mnt", "pid", "ipc", "uts", "net", "cgroup" };
	char path[64], key[32], target[64];
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		snprintf(path, sizeof path, "/proc/self/ns/%s", names[i]);
		snprintf(key, sizeof key, "ns.%s", names[i]);
		ssize_t n = readlink(path, target, sizeof target - 1);
		target[n > 0 ? n : 0] = 0;
		fact(key, "%s", n > 0 ? target : error_name());
	}
	FILE *cgroups = fopen("/proc/self/cgroup", "re");
	for (char line[4096]; cgroups && fgets(line, sizeof line, cgroups);)
		fact("cgroup", "%s", strtok(line, "\n"));
	if (cgroups)
		fclose(cgroups);
}

static void network(void)
{
	char key[32];
	for (int family = 0; family < 48; family++) {
		int types[] = { SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_SEQPACKET };
		for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
			int fd = socket(family, types[i] | SOCK_CLOEXEC, 0);
			snprintf(key, sizeof key, "socket.%d.%d", family, types[i]);
			if (fd >= 0 || (errno != EAFNOSUPPORT && errno != ESOCKTNOSUPPORT &&
					errno != EPROTONOSUPPORT))
				fact(key, "%s", outcome(fd));
			if (fd >= 0)
				close(fd);
		}
	}
	FILE *devices = fopen("/proc/self/net/dev", "re");
	for (char line[512]; devices && fgets(line, sizeof line, devices);)
		if (strchr(line, ':'))
			fact("interface", "%.*s", (int)strcspn(line + strspn(line, " "), ":"),
			     line + strspn(line, " "));
	if (devices)
		fclose(devices);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request = { .ifr_name = "lo" };
	if (fd >= 0 && ioctl(fd, SIOCGIFFLAGS, &request) == 0)
		fact("lo", "%s", request.ifr_flags & IFF_UP ? "up" : "down");
	else
		fact("lo", "%s", error_name());
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*tell)(void); } chapters[] = {
		{ "descriptors", descriptors }, { "process", process }, { "identity", identity },
		{ "capabilities", capabilities }, { "limits", limits }, { "root", root },
		{ "devices", devices }, { "proc", proc }, { "mounts", mounts },
		{ "namespaces", namespaces }, { "network", network },
	};
	for (size_t i = 0; i < sizeof chapters / sizeof *chapters; i++) {
		int wanted = argc < 2;
		for (int j = 1; j < argc; j++)
			wanted |= strcmp(argv[j], chapters[i].name) == 0;
		if (wanted)
			chapters[i].tell();
	}
	for (char **entry = environ; *entry; entry++)
		fact("env", "%s", *entry);
	return 0;
}
