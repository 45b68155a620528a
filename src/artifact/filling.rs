//! An executable that is put into its memfd, and hashed, while it arrives.

use std::{io, sync::Arc};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::{
    call::Sealed,
    names::Digest,
    sys::{self, SealedBytes},
};

/// A memfd on its way to an executable. Dropped before it is finished, it is gone.
#[derive(Debug)]
pub struct Filling {
    memfd: sys::Unsealed,
    hash: Sha256,
}

impl Filling {
    /// One with nothing in it.
    ///
    /// # Errors
    /// Those of memfd_create(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self { memfd: sys::Unsealed::new(c"artifact", true)?, hash: Sha256::new() })
    }

    /// Adds a piece at its end. May block.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn add(&mut self, piece: &[u8]) -> io::Result<()> {
        self.memfd.append(piece)?;
        self.hash.update(piece);
        Ok(())
    }

    /// Seals it: its content, and what holds it. May block.
    ///
    /// # Errors
    /// Those of [`sys::sealed_memfd`] and of mmap(2): EINVAL for no content.
    pub fn finish(self) -> io::Result<(Bytes, Sealed)> {
        let memory = Arc::new(self.memfd.seal()?);
        let bytes = Bytes::from_owner(SealedBytes::of(&memory)?);
        let digest = Digest::from_bytes(self.hash.finalize().into());
        Ok((bytes, Sealed { digest, memory }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_what_the_memfd_holds() {
        let content: Vec<u8> = (0..300_000_u32).map(|index| (index % 251) as u8).collect();
        for size in [1_000, 4096, 299_999, 300_000] {
            let mut filling = Filling::new().unwrap();
            for piece in content.chunks(size) {
                filling.add(piece).unwrap();
            }
            let (bytes, sealed) = filling.finish().unwrap();
            assert_eq!(bytes, content);
            assert_eq!(sealed.digest, Digest::of(&content));
            assert_eq!(SealedBytes::of(&sealed.memory).unwrap().as_ref(), content);
        }
    }
}
