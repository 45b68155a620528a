//! Executables by content: each held once per namespace, in a sealed memfd, for
//! as long as there is room. A namespace finds only what it has brought itself.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use super::{Artifact, ArtifactError, BLOCKING_SIZE, elf::Executable, internal};
use crate::{
    names::{Digest, Namespace},
    sys,
};

/// Most artifacts held, whatever their size: each takes a descriptor.
const ENTRIES_MAX: usize = 4096;

/// Of the descriptors that this process may have, artifacts take one in so many:
/// connections and runs need some as well.
const DESCRIPTOR_SHARE: u64 = 4;

/// Who holds what. Each namespace has a copy of its own: programs see the file
/// that they run from (/proc/self/exe), with its times, locks and watches, and
/// one tenant must not meet another there.
type Key = (Namespace, Digest);

/// What an executable comes in.
#[derive(Debug)]
pub enum Content {
    /// To be copied into a memfd.
    Bytes(Bytes),
    /// A sealed memfd that no call but this has, with so many bytes.
    Sealed(Arc<OwnedFd>, u64),
}

/// How much a [`Store`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Executables, one for each namespace that brought it.
    pub count: usize,
    /// Their sizes' sum.
    pub bytes: u64,
}

/// The artifacts held.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Most bytes, and most entries.
    bytes_max: u64,
    entries_max: usize,
    entries: HashMap<Key, Entry>,
    /// By last use, oldest first.
    order: BTreeMap<u64, Key>,
    /// Sum of the entries' sizes.
    bytes: u64,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    artifact: Artifact,
    used: u64,
}

impl Store {
    /// A store that keeps up to `budget` bytes.
    #[must_use]
    pub fn new(budget: u64) -> Self {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let share = files.map_or(usize::MAX, |files| {
            usize::try_from(files / DESCRIPTOR_SHARE).unwrap_or(usize::MAX)
        });
        Self::bounded(budget, ENTRIES_MAX.min(share))
    }

    fn bounded(bytes_max: u64, entries_max: usize) -> Self {
        let state = State {
            bytes_max,
            entries_max,
            entries: HashMap::new(),
            order: BTreeMap::new(),
            bytes: 0,
            clock: 0,
        };
        Self { state: Mutex::new(state) }
    }

    /// How much is held.
    #[must_use]
    pub fn held(&self) -> Held {
        let state = self.state();
        Held { count: state.entries.len(), bytes: state.bytes }
    }

    /// What `namespace` brought earlier under this digest, if it is still held.
    #[must_use]
    pub fn get(&self, namespace: &Namespace, digest: Digest) -> Option<Artifact> {
        self.state().use_entry(&(namespace.clone(), digest))
    }

    /// Holds an executable for `namespace` from now on. Content that is held
    /// already is not kept again; what finds no room runs all the same, but is
    /// gone afterwards.
    ///
    /// # Errors
    /// [`ArtifactError::Internal`] when no memfd can be made.
    pub async fn put(
        &self,
        namespace: &Namespace,
        digest: Digest,
        kind: Executable,
        content: Content,
    ) -> Result<Artifact, ArtifactError> {
        if let Some(artifact) = self.get(namespace, digest) {
            return Ok(artifact);
        }
        let (memory, size) = match content {
            Content::Sealed(memory, size) => (memory, size),
            Content::Bytes(bytes) => {
                let size = bytes.len() as u64;
                (Arc::new(copy(bytes).await?), size)
            }
        };
        let artifact = Artifact { digest, size, kind, memory, stored: false };
        let mut state = self.state();
        // Another call may have brought the same bytes meanwhile.
        if let Some(artifact) = state.use_entry(&(namespace.clone(), digest)) {
            return Ok(artifact);
        }
        if !state.make_room(size) {
            return Ok(artifact);
        }
        Ok(state.insert(namespace, artifact))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Marks an entry as the one used last.
    fn use_entry(&mut self, key: &Key) -> Option<Artifact> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        self.order.remove(&entry.used);
        entry.used = self.clock;
        self.order.insert(self.clock, key.clone());
        Some(entry.artifact.clone())
    }

    fn insert(&mut self, namespace: &Namespace, mut artifact: Artifact) -> Artifact {
        self.clock += 1;
        artifact.stored = true;
        self.bytes += artifact.size;
        let key = (namespace.clone(), artifact.digest);
        self.order.insert(self.clock, key.clone());
        self.entries.insert(key, Entry { artifact: artifact.clone(), used: self.clock });
        artifact
    }

    /// Drops what was unused for longest until `size` more bytes fit; whether
    /// they do. Nothing is dropped in vain.
    fn make_room(&mut self, size: u64) -> bool {
        let (mut count, mut bytes) = (self.entries.len(), self.bytes);
        let fits = |count: usize, bytes: u64| {
            count < self.entries_max && bytes.saturating_add(size) <= self.bytes_max
        };
        let mut idle = Vec::new();
        for key in self.order.values() {
            if fits(count, bytes) {
                break;
            }
            let artifact = &self.entries[key].artifact;
            // A run, or a call about to run it, holds another reference.
            if Arc::strong_count(&artifact.memory) == 1 {
                count -= 1;
                bytes -= artifact.size;
                idle.push(key.clone());
            }
        }
        if !fits(count, bytes) {
            return false;
        }
        for key in idle {
            self.remove(&key);
        }
        true
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.order.remove(&entry.used);
            self.bytes -= entry.artifact.size;
        }
    }
}

async fn copy(bytes: Bytes) -> Result<OwnedFd, ArtifactError> {
    let large = bytes.len() > BLOCKING_SIZE;
    let seal = move || sys::sealed_memfd(c"artifact", &[&bytes], true);
    let sealed = if large {
        let joined = tokio::task::spawn_blocking(seal).await;
        joined.map_err(|error| internal("copying the artifact", &error))?
    } else {
        seal()
    };
    sealed.map_err(|error| internal("copying the artifact", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Namespace {
        text.parse().unwrap()
    }

    async fn put(store: &Store, namespace: &str, content: &[u8]) -> Artifact {
        let (namespace, digest) = (name(namespace), Digest::of(content));
        let content = Content::Bytes(Bytes::copy_from_slice(content));
        store.put(&namespace, digest, Executable::Static, content).await.unwrap()
    }

    #[tokio::test]
    async fn a_tenant_sees_only_what_it_brought() {
        let store = Store::new(100);
        let first = put(&store, "a", b"program").await;
        assert!(store.get(&name("a"), first.digest).is_some());
        assert!(store.get(&name("b"), first.digest).is_none());

        let second = put(&store, "b", b"program").await;
        assert!(!Arc::ptr_eq(&first.memory, &second.memory), "no file is shared by tenants");
        let again = put(&store, "a", b"program").await;
        assert!(Arc::ptr_eq(&first.memory, &again.memory), "copied once");
        assert!(store.get(&name("b"), first.digest).is_some());
    }

    #[tokio::test]
    async fn what_comes_in_a_memfd_is_held_in_it_and_only_once() {
        let store = Store::new(100);
        let sealed = || {
            let memory = sys::sealed_memfd(c"artifact", &[b"program"], true).unwrap();
            Arc::new(memory)
        };
        let put = async |namespace: &str, memory: &Arc<OwnedFd>| {
            let content = Content::Sealed(Arc::clone(memory), 7);
            let digest = Digest::of(b"program");
            store.put(&name(namespace), digest, Executable::Static, content).await.unwrap()
        };
        let (first, second, other) = (sealed(), sealed(), sealed());
        assert!(Arc::ptr_eq(&put("a", &first).await.memory, &first));
        assert!(Arc::ptr_eq(&put("a", &second).await.memory, &first));
        assert_eq!(Arc::strong_count(&second), 1, "it is let go");
        assert!(Arc::ptr_eq(&put("b", &other).await.memory, &other), "a tenant has its own");
        assert_eq!(store.held(), Held { count: 2, bytes: 14 });
    }

    #[tokio::test]
    async fn the_longest_unused_goes_first() {
        let store = Store::new(10);
        let one = put(&store, "a", b"1111").await.digest;
        let two = put(&store, "a", b"2222").await.digest;
        assert!(store.get(&name("a"), one).is_some());
        let three = put(&store, "a", b"3333").await.digest;
        assert!(store.get(&name("a"), two).is_none(), "one was used after it");
        for held in [one, three] {
            assert!(store.get(&name("a"), held).is_some());
        }
    }

    #[tokio::test]
    async fn what_runs_is_not_evicted_and_what_has_no_room_still_runs() {
        let store = Store::new(10);
        let running = put(&store, "a", b"11111111").await;
        let other = put(&store, "a", b"2222").await;
        assert!(!other.stored);
        assert!(store.get(&name("a"), other.digest).is_none());
        assert!(store.get(&name("a"), running.digest).is_some());

        drop(running);
        assert!(put(&store, "a", b"2222").await.stored);
        assert!(!put(&store, "a", b"far too large").await.stored);
        assert!(store.get(&name("a"), other.digest).is_some(), "nothing is evicted in vain");
    }

    #[tokio::test]
    async fn the_count_of_entries_is_bounded() {
        let store = Store::bounded(u64::MAX, 3);
        let running = put(&store, "a", b"running").await;
        for content in ["1", "2", "3", "4"] {
            assert!(put(&store, "a", content.as_bytes()).await.stored);
        }
        let state = store.state();
        assert_eq!((state.entries.len(), state.order.len()), (3, 3));
        assert_eq!(state.bytes, 9);
        assert!(state.entries.contains_key(&(name("a"), running.digest)), "in use");
    }
}
