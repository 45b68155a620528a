//! What a program wrote, and init's record at its end.

use super::protocol::{MARK_LEN, NONCE_LEN, Record};

/// One of the two streams of a container.
#[derive(Debug)]
pub struct Marked {
    nonce: [u8; NONCE_LEN],
    /// What may be the beginning of the record.
    held: Vec<u8>,
    record: Option<Record>,
}

impl Marked {
    /// A stream that ends with a record of this nonce.
    #[must_use]
    pub fn new(nonce: [u8; NONCE_LEN]) -> Self {
        Self { nonce, held: Vec::new(), record: None }
    }

    /// Takes what came, and gives what of it and of what was held back is the program's.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut whole = std::mem::take(&mut self.held);
        whole.extend_from_slice(bytes);
        self.record = None; // it wasn't the end
        if let Some((before, last)) = whole.split_last_chunk::<{ Record::LEN }>()
            && let Some(record) = Record::decode(last, &self.nonce)
        {
            self.record = Some(record);
            let length = before.len();
            whole.truncate(length);
            return whole;
        }
        self.held = whole.split_off(whole.len() - self.may_be_the_beginning(&whole));
        whole
    }

    /// The record, once it was the last that came.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        self.record
    }

    /// What was held back, of a stream that ended without a record.
    pub fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    /// How many of the last bytes a record may begin with. The program can't know the
    /// mark: but for a few bytes by chance, nothing of its own is ever held back.
    fn may_be_the_beginning(&self, whole: &[u8]) -> usize {
        let most = whole.len().min(Record::LEN - 1);
        let begins = |length: &usize| {
            let last = &whole[whole.len() - length..];
            let compared = last.len().min(MARK_LEN);
            last[..compared] == self.nonce[..compared]
        };
        (1..=most).rev().find(begins).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::protocol::Verdict, *};

    const NONCE: [u8; NONCE_LEN] = *b"aaaaaaaaaaaaaaabthe key is 16 b.";
    const RECORD: Record = Record { verdict: Verdict::Ended(9), denied: false, left_behind: true };

    proptest! {
        /// However it is cut into pieces.
        #[test]
        fn the_programs_share_comes_whole_and_the_record_at_the_end(
            text in proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b')], 0..60),
            cuts in proptest::collection::vec(1_usize..9, 0..40),
        ) {
            let mut stream = text.clone();
            stream.extend_from_slice(&RECORD.encode(&NONCE));
            let mut marked = Marked::new(NONCE);
            let (mut given, mut rest) = (Vec::new(), &stream[..]);
            for cut in cuts.into_iter().chain(std::iter::repeat(7)) {
                if rest.is_empty() {
                    break;
                }
                prop_assert_eq!(marked.record(), None);
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                given.extend(marked.take(piece));
                rest = more;
            }
            prop_assert_eq!(marked.record(), Some(RECORD));
            prop_assert_eq!(given, text);
        }
    }

    #[test]
    fn what_only_looks_like_one_is_the_programs() {
        let mut marked = Marked::new(NONCE);
        for other in [b"aaaaaaaaaaaaaaacthe key is 16 b.", b"aaaaaaaaaaaaaaabanother key, 16."] {
            let forged = RECORD.encode(other);
            assert_eq!(marked.take(&forged), forged);
            assert_eq!(marked.record(), None);
        }
        assert!(marked.take(&NONCE[..5]).is_empty());
        assert_eq!(marked.rest(), &NONCE[..5], "of a stream that ended there");
    }

    #[test]
    fn one_that_is_not_the_last_counts_no_more() {
        let mut marked = Marked::new(NONCE);
        assert!(marked.take(&RECORD.encode(&NONCE)).is_empty());
        assert!(marked.record().is_some());
        assert_eq!(marked.take(b"more"), b"more");
        assert_eq!(marked.record(), None);
    }
}
