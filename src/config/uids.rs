//! The host uids that jails run as: which ranges are sound, and which belong to
//! somebody else by subuid(5).

/// Reads `FIRST-LAST`.
#[must_use]
pub fn parse(text: &str) -> Option<(u32, u32)> {
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (first, last) = text.split_once('-').filter(|(a, b)| digits(a) && digits(b))?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// Checks a range by itself.
///
/// # Errors
/// What is wrong with it, to complete "RANGE, ...".
pub fn check((first, last): (u32, u32)) -> Result<(), &'static str> {
    // A jail maps its own uid and that of its init.
    const LEAST: u32 = 2;
    const FIRST_ORDINARY: u32 = 1000;
    const NOBODY: u32 = 65_534;
    if first > last {
        return Err("which ends before it begins");
    }
    if last - first < LEAST - 1 {
        return Err("which has fewer than two uids");
    }
    if first < FIRST_ORDINARY {
        return Err("which has uids of the system (below 1000)");
    }
    if (first..=last).contains(&NOBODY) {
        return Err("which has nobody's uid (65534)");
    }
    if last >= u32::MAX - 1 {
        return Err("which has uids that the kernel keeps for itself (from 4294967294)");
    }
    Ok(())
}

/// The first line of `/etc/subuid` that gives a part of the range to somebody
/// other than `own` (names or numbers). Lines that aren't understood are nobody's.
#[must_use]
pub fn taken<'a>((first, last): (u32, u32), subuid: &'a str, own: &[&str]) -> Option<&'a str> {
    subuid.lines().map(str::trim).find(|line| {
        let mut fields = line.split(':');
        let (Some(user), Some(start), Some(count), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        let (Ok(start), Ok(count)) = (start.trim().parse::<u64>(), count.trim().parse::<u64>())
        else {
            return false;
        };
        let end = start.saturating_add(count);
        !own.contains(&user.trim()) && start <= u64::from(last) && u64::from(first) < end
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_sound_ranges_pass() {
        assert_eq!(parse("2000000-2065535"), Some((2_000_000, 2_065_535)));
        for bad in ["", "5", "-", "1-", "-1", "+1-2", "1 - 2", "1-2-3", "1-4294967296"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(check((2_000_000, 2_065_535)), Ok(()));
        assert_eq!(check((1000, 1001)), Ok(()));
        for bad in [
            (1000, 1000),
            (1001, 1000),
            (0, 5000),
            (999, 5000),
            (60_000, 70_000),
            (5_000_000, u32::MAX - 1),
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn other_users_subuids_are_off_limits() {
        let file = "# comment\nme:2000000:65536\nother:100000:65536\nbroken:x:y\n";
        let own = ["me", "0"];
        assert_eq!(taken((2_000_000, 2_065_535), file, &own), None);
        assert_eq!(taken((2_000_000, 2_065_535), file, &["root"]), Some("me:2000000:65536"));
        assert_eq!(taken((165_535, 165_600), file, &own), Some("other:100000:65536"));
        assert_eq!(taken((165_536, 165_600), file, &own), None);
        assert_eq!(taken((90_000, 99_999), file, &own), None);
        assert_eq!(taken((90_000, 100_000), file, &own), Some("other:100000:65536"));
    }

    proptest! {
        #[test]
        fn any_subuid_file_is_read(text in "([a-z0-9:]{0,24}\n){0,8}", first: u32, last: u32) {
            let _ = taken((first, last), &text, &["root"]);
        }
    }
}
