//! Tests of the server's own file and of what lies over it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Config, ConfigOverrides, ListenAddress, MemoryBudget, Reload, Surroundings, load, schema,
    written::describe,
};
use crate::policy::fault::Place;

/// A host that doesn't exist.
struct Host {
    variables: BTreeMap<&'static str, OsString>,
    root: bool,
    subuid: &'static str,
}

impl Host {
    fn root() -> Self {
        Self { variables: BTreeMap::new(), root: true, subuid: "" }
    }

    fn user() -> Self {
        Self { root: false, ..Self::root() }.with("HOME", "/home/alice")
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.variables.insert(name, value.into());
        self
    }

    fn load(
        &self,
        content: &str,
        overrides: &ConfigOverrides,
    ) -> Result<super::LoadedConfig, Vec<String>> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("d.toml");
        fs::write(&file, content).unwrap();
        let variable = |name: &str| self.variables.get(name).cloned();
        let surroundings = Surroundings {
            variable: &variable,
            root: self.root,
            host_name: "here".to_owned(),
            subuid: self.subuid.to_owned(),
        };
        load(Some(&file), overrides, &surroundings).map_err(|faults| {
            let prefix = format!("{}:", file.display());
            faults.iter().map(|fault| fault.to_string().replace(&prefix, "")).collect()
        })
    }

    fn config(&self, content: &str) -> Config {
        self.load(content, &ConfigOverrides::default()).unwrap().config
    }

    fn faults(&self, content: &str) -> Vec<String> {
        self.load(content, &ConfigOverrides::default()).err().unwrap_or_default()
    }
}

/// Key, file, and how the one fault begins.
const CASES: &[(&str, &str, &str)] = &[
    (
        "server.id",
        "[server]\nid = \"a b\"",
        "2:6: server.id is \"a b\", which is not a name for this server; ",
    ),
    (
        "server.listen",
        "[server]\nlisten = \"127.0.0.1:1\"",
        "2:10: server.listen is \"127.0.0.1:1\", which is not a list; ",
    ),
    (
        "server.listen",
        "[server]\nlisten = [\"127.0.0.1\"]",
        "2:11: server.listen has \"127.0.0.1\", which has no port; write \"HOST:PORT\"",
    ),
    (
        "server.listen",
        "[server]\nlisten = [\"::1:50051\"]",
        "2:11: server.listen has \"::1:50051\", whose IPv6 address needs brackets; ",
    ),
    (
        "server.listen",
        "[server]\nlisten = [\"...\"]",
        "2:11: server.listen has \"...\", which has no port; ",
    ),
    (
        "server.listen",
        "[server]\nlisten = []",
        "2:10: server.listen has 0 addresses; write 1 to 16",
    ),
    (
        "server.listen",
        "[server]\nlisten = [\"unix:/a\", \"unix:/a\"]",
        "2:22: server.listen has \"unix:/a\" twice; ",
    ),
    (
        "server.listen",
        "[server]\nlisten = [\"[::1]:1\", \"0.0.0.0:50051\"]",
        "2:22: server.listen has \"0.0.0.0:50051\", which others can reach, without TLS; write a loopback address or unix:PATH, or start with --insecure",
    ),
    (
        "server.health_listen",
        "[server]\nhealth_listen = \"8080\"",
        "2:17: server.health_listen has \"8080\", which has no port; ",
    ),
    (
        "server.health_listen",
        "[server]\nhealth_listen = \"example.com:80\"",
        "2:17: server.health_listen has \"example.com:80\", which others can reach",
    ),
    (
        "server.socket_mode",
        "[server]\nsocket_mode = 0o660",
        "2:15: server.socket_mode is 0o660, which is not the permission bits of a socket; ",
    ),
    (
        "server.socket_mode",
        "[server]\nsocket_mode = \"0680\"",
        "2:15: server.socket_mode is \"0680\", which",
    ),
    (
        "server.socket_mode",
        "[server]\nsocket_mode = \"1777\"",
        "2:15: server.socket_mode is \"1777\", which",
    ),
    (
        "server.socket_group",
        "[server]\nsocket_group = \"-x\"",
        "2:16: server.socket_group is \"-x\", which is not the name of a group; ",
    ),
    (
        "server.drain_timeout",
        "[server]\ndrain_timeout = 45",
        "2:17: server.drain_timeout is 45, which is not a duration; ",
    ),
    (
        "server.concurrency",
        "[server]\nconcurrency = -1",
        "2:15: server.concurrency is -1, which is not a whole number from 0 to 1000000; ",
    ),
    (
        "server.memory",
        "[server]\nmemory = \"101%\"",
        "2:10: server.memory is \"101%\", which is not a share of the memory; ",
    ),
    ("server.memory", "[server]\nmemory = \"0%\"", "2:10: server.memory is \"0%\", which"),
    ("server.memory", "[server]\nmemory = \"nan%\"", "2:10: server.memory is \"nan%\", which"),
    (
        "server.memory",
        "[server]\nmemory = \"80\\u0025\\u0025\"",
        "2:10: server.memory is \"80%%\", which",
    ),
    ("server.memory", "[server]\nmemory = \"1MiB\"", "2:10: server.memory is 1MiB, less"),
    (
        "server.inflight_bytes",
        "[server]\ninflight_bytes = \"1KiB\"",
        "2:18: server.inflight_bytes is 1KiB, less than the least possible; write at least \"1MiB\"",
    ),
    (
        "server.max_connections",
        "[server]\nmax_connections = 0",
        "2:19: server.max_connections is 0, which",
    ),
    (
        "server.cgroup_parent",
        "[server]\ncgroup_parent = \"/a/../b\"",
        "2:17: server.cgroup_parent is \"/a/../b\", which is not the path of a cgroup; ",
    ),
    (
        "server.uid_range",
        "[server]\nuid_range = \"2000000\"",
        "2:13: server.uid_range is \"2000000\", which is not a range of uids; write FIRST-LAST",
    ),
    (
        "server.uid_range",
        "[server]\nuid_range = \"0-65535\"",
        "2:13: server.uid_range is \"0-65535\", which has uids of the system (below 1000); ",
    ),
    (
        "server.uid_range",
        "[server]\nuid_range = \"2000-1000\"",
        "2:13: server.uid_range is \"2000-1000\", which ends before it begins; ",
    ),
    (
        "policies.dir",
        "[policies]\ndir = \"policies\"",
        "2:7: policies.dir is \"policies\", which is not an absolute path; ",
    ),
    (
        "policies.reload",
        "[policies]\nreload = \"wacth\"",
        "2:10: policies.reload is \"wacth\", which is not one of the words it can be; did you mean \"watch\"?",
    ),
    ("state.dir", "[state]\ndir = \"\"", "2:7: state.dir is \"\", which is not an absolute path; "),
    (
        "artifacts.cache",
        "[artifacts]\ncache = \"unlimited\"",
        "2:9: artifacts.cache is \"unlimited\", which is not a size; ",
    ),
    (
        "docker.directory",
        "[docker]\ndirectory = \"cache\"",
        "2:13: docker.directory is \"cache\", which is not an absolute path; ",
    ),
    (
        "docker.socket",
        "[docker]\nsocket = \"unix:///x\"",
        "2:10: docker.socket is \"unix:///x\", which is not an absolute path; ",
    ),
    ("", "listen = []", "1:1: unknown key \"listen\"; it belongs in [server]"),
    (
        "",
        "[server]\nlistne = []",
        "2:1: unknown key \"listne\" in [server]; did you mean \"listen\"?",
    ),
    ("", "[sever]", "1:2: unknown table \"sever\"; did you mean \"server\"?"),
    ("", "[server\n", "1:8: not valid TOML: "),
];

#[test]
fn each_wrong_value_is_told_with_its_place() {
    for (key, text, begin) in CASES {
        let faults = Host::root().faults(text);
        assert!(faults.len() == 1 && faults[0].starts_with(begin), "{key}: {begin}\n{faults:#?}");
    }
    let tried: BTreeSet<&str> = CASES.iter().map(|(key, ..)| *key).collect();
    for key in describe() {
        let name = format!("{}.{}", key.table, key.key);
        assert!(tried.contains(name.as_str()), "no wrong value is tried for {name}");
    }
}

#[test]
fn the_defaults_are_the_documented_ones() {
    let config = Host::root().config("");
    assert_eq!(
        config,
        Config {
            id: "here".to_owned(),
            listen: vec![ListenAddress::Tcp { host: "127.0.0.1".to_owned(), port: 50051 }],
            health_listen: None,
            socket_mode: 0o660,
            socket_group: String::new(),
            drain_timeout: Duration::from_secs(45),
            concurrency: 0,
            memory: MemoryBudget::Percent(80.0),
            inflight_bytes: 1 << 30,
            max_connections: 1024,
            cgroup_parent: String::new(),
            uid_range: (2_000_000, 2_065_535),
            policies: "/etc/dispatcher/policies".into(),
            reload: Reload::Signal,
            state: "/var/lib/dispatcher".into(),
            artifact_cache: 256 << 20,
            docker_socket: "/var/run/docker.sock".into(),
            docker_directory: "/var/cache/dispatcher".into(),
            insecure: false,
        }
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/dispatcher.toml");
    assert_eq!(Host::root().config(&fs::read_to_string(path).unwrap()), config);
}

#[test]
fn every_value_reaches_the_configuration() {
    let config = Host::root().config(
        "[server]\nid = \"node-1\"\nlisten = [\"[::1]:0\", \"unix:/run/d.sock\"]\n\
         health_listen = \"localhost:8080\"\nsocket_mode = \"600\"\nsocket_group = \"ops\"\n\
         drain_timeout = \"0s\"\nconcurrency = 7\nmemory = \"2GiB\"\ninflight_bytes = \"5m\"\n\
         max_connections = 3\ncgroup_parent = \"/a.slice/b\"\nuid_range = \"70000-70001\"\n\
         [policies]\ndir = \"/p/\"\nreload = \"watch\"\n[state]\ndir = \"/s\"\n\
         [artifacts]\ncache = 0\n[docker]\nsocket = \"/d\"\ndirectory = \"/c\"\n",
    );
    assert_eq!(config.id, "node-1");
    assert_eq!(config.listen[1], ListenAddress::Unix("/run/d.sock".into()));
    assert_eq!(config.health_listen.unwrap().to_string(), "localhost:8080");
    assert_eq!(config.socket_mode, 0o600);
    assert_eq!(config.socket_group, "ops");
    assert_eq!(config.drain_timeout, Duration::ZERO);
    assert_eq!(config.concurrency, 7);
    assert_eq!(config.memory, MemoryBudget::Bytes(2 << 30));
    assert_eq!(config.inflight_bytes, 5 << 20);
    assert_eq!(config.max_connections, 3);
    assert_eq!(config.cgroup_parent, "/a.slice/b");
    assert_eq!(config.uid_range, (70_000, 70_001));
    assert_eq!(config.policies, PathBuf::from("/p"));
    assert_eq!(config.reload, Reload::Watch);
    assert_eq!(config.state, PathBuf::from("/s"));
    assert_eq!(config.artifact_cache, 0);
    assert_eq!(config.docker_socket, PathBuf::from("/d"));
    assert_eq!(config.docker_directory, PathBuf::from("/c"));
}

#[test]
fn flags_beat_variables_beat_the_file_beats_the_defaults() {
    let file = "[server]\nlisten = [\"127.0.0.1:1\"]\ndrain_timeout = \"1s\"\n\
                [policies]\ndir = \"/file/p\"\n[state]\ndir = \"/file/s\"\n";
    let host = Host::root()
        .with("DISPATCHER_LISTEN", "127.0.0.1:2, unix:/two")
        .with("DISPATCHER_POLICIES", "/variable/p")
        .with("DISPATCHER_STATE", "")
        .with("DISPATCHER_DRAIN_TIMEOUT", "2s");
    let config = host.config(file);
    let shown: Vec<String> = config.listen.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["127.0.0.1:2", "unix:/two"]);
    assert_eq!(config.policies, PathBuf::from("/variable/p"));
    assert_eq!(config.state, PathBuf::from("/file/s"), "an empty variable is none");
    assert_eq!(config.drain_timeout, Duration::from_secs(2));

    let overrides = ConfigOverrides {
        listen: Some(vec!["localhost:3".to_owned()]),
        policies: Some("relative".into()),
        state: Some("/flag/s".into()),
        drain_timeout: Some("3s".to_owned()),
        insecure: None,
    };
    let loaded = host.load(file, &overrides).unwrap();
    assert_eq!(loaded.config.listen.len(), 1);
    assert_eq!(loaded.config.policies, std::env::current_dir().unwrap().join("relative"));
    assert_eq!(loaded.config.state, PathBuf::from("/flag/s"));
    assert_eq!(loaded.config.drain_timeout, Duration::from_secs(3));
    let place = |key: &str| &loaded.settings.iter().find(|(name, ..)| name == key).unwrap().2;
    assert_eq!(*place("server.listen"), Place::Flag("--listen"));
    assert_eq!(*place("server.memory"), Place::BuiltIn);
    assert_eq!(loaded.settings.len(), describe().len());
}

#[test]
fn wrong_flags_and_variables_are_told_by_name() {
    let host =
        Host::root().with("DISPATCHER_LISTEN", "nowhere").with("DISPATCHER_DRAIN_TIMEOUT", "soon");
    let overrides = ConfigOverrides {
        listen: Some(vec!["0.0.0.0:1".to_owned()]),
        drain_timeout: Some("3".to_owned()),
        ..ConfigOverrides::default()
    };
    let faults = host.load("[server]\nid = 3", &overrides).unwrap_err();
    assert_eq!(
        faults,
        [
            "2:6: server.id is 3, which is not a name for this server; \
             write at most 253 letters, digits, dots, dashes, colons or _",
            "$DISPATCHER_DRAIN_TIMEOUT: is \"soon\", which is not a duration; \
             write a number with a unit, such as \"45s\"",
            "$DISPATCHER_LISTEN: has \"nowhere\", which has no port; \
             write \"HOST:PORT\", \"[IPV6]:PORT\" or \"unix:PATH\"",
            "--drain-timeout: is \"3\", which is not a duration; \
             write a number with a unit, such as \"45s\"",
            "--listen: server.listen has \"0.0.0.0:1\", which others can reach, without TLS; \
             write a loopback address or unix:PATH, or start with --insecure",
        ]
    );
    let overrides = ConfigOverrides {
        listen: Some(vec!["0.0.0.0:1".to_owned()]),
        insecure: Some(true),
        ..ConfigOverrides::default()
    };
    assert!(Host::root().load("", &overrides).unwrap().config.insecure);
}

#[test]
fn ordinary_users_have_directories_of_their_own() {
    let config = Host::user().config("");
    assert_eq!(config.policies, PathBuf::from("/home/alice/.config/dispatcher/policies"));
    assert_eq!(config.state, PathBuf::from("/home/alice/.local/state/dispatcher"));
    let config =
        Host::user().with("XDG_CONFIG_HOME", "/c").with("XDG_STATE_HOME", "relative").config("");
    assert_eq!(config.policies, PathBuf::from("/c/dispatcher/policies"));
    assert_eq!(config.state, PathBuf::from("/home/alice/.local/state/dispatcher"));
    for host in [Host::user(), Host::root()] {
        let config = host.with("STATE_DIRECTORY", "/var/lib/one:/var/lib/two").config("");
        assert_eq!(config.state, PathBuf::from("/var/lib/one"));
    }
}

#[test]
fn uids_of_others_are_refused_to_root() {
    let taken = "alice:1999999:2\n";
    let faults = Host { subuid: taken, ..Host::root() }.faults("");
    assert_eq!(
        faults,
        ["built-in: server.uid_range is \"2000000-2065535\", of which /etc/subuid gives \
          \"alice:1999999:2\" away; write a range that nobody has"]
    );
    let own = "root:2000000:65536\n0:2000000:65536\n";
    assert_eq!(Host { subuid: own, ..Host::root() }.faults(""), [""; 0]);
    assert_eq!(Host { subuid: taken, ..Host::user() }.faults(""), [""; 0]);
}

#[test]
fn a_named_file_must_be_there() {
    let host = Host::root();
    let variable = |name: &str| host.variables.get(name).cloned();
    let surroundings = Surroundings {
        variable: &variable,
        root: true,
        host_name: String::new(),
        subuid: String::new(),
    };
    let overrides = ConfigOverrides::default();
    let faults = load(Some(Path::new("/nowhere.toml")), &overrides, &surroundings).unwrap_err();
    assert!(faults[0].to_string().starts_with("/nowhere.toml:1:1: can't be read: "), "{faults:?}");
    let variable = |name: &str| (name == "DISPATCHER_CONFIG").then(|| "/there.toml".into());
    let surroundings = Surroundings { variable: &variable, ..surroundings };
    let faults = load(None, &overrides, &surroundings).unwrap_err();
    assert!(faults[0].to_string().starts_with("/there.toml:1:1: can't be read: "), "{faults:?}");
}

#[test]
fn the_schema_describes_every_key() {
    let schema = schema();
    for key in describe() {
        let path = format!("/properties/{}/properties/{}/description", key.table, key.key);
        let text = schema.pointer(&path).and_then(|text| text.as_str());
        assert!(text.is_some_and(|text| text.ends_with('.')), "{path}");
    }
}
