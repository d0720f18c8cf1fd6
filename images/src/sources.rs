//! The machine's own apt sources, from which this crate's are derived: no host is named here.

use std::collections::BTreeMap;
use std::path::Path;

/// One archive as apt knows it: a place, suites in it, components, and options such as the key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    options: BTreeMap<String, String>,
}

/// Reads every `deb` source of the machine; what cannot be read or parsed is skipped, as apt
/// itself will say.
pub(crate) fn machine_sources(etc_apt: &Path) -> Vec<Source> {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(etc_apt.join("sources.list.d")) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(one_line)),
            Some("sources") => sources.extend(paragraphs(&text).iter().filter_map(deb822)),
            _ => {}
        }
    }
    sources
}

/// Whether a release's backports are used. Not every release has them, and apt fails on a suite
/// that is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Backports {
    Added,
    LeftOut,
}

/// The sources for one release, in deb822 form: its main suite with its updates and security suites, and, if asked for,
/// its backports, where the machine has them, or else in the main suite's place. `None` if the machine has no source of
/// that release.
///
/// Vendors name suites after Debian's releases, too: the main suite is the one whose place has the release's updates,
/// where there is one, and then no other suite of its name is taken.
pub(crate) fn for_release(sources: &[Source], codename: &str, backports: Backports) -> Option<String> {
    let [updates, security, backported] =
        ["updates", "security", "backports"].map(|kind| format!("{codename}-{kind}"));
    let has_updates = |source: &&Source| {
        sources
            .iter()
            .any(|other| other.has(&updates) && other.shares_place(source))
    };
    let of_release = || sources.iter().filter(|source| source.has(codename));
    let known = of_release().find(has_updates);
    let main = known.or_else(|| of_release().next())?;
    let mut text = String::new();
    for source in sources {
        let wanted = |suite: &&String| match suite.split('/').next().unwrap_or(suite) {
            name if name == codename => known.is_none() || source.shares_place(main),
            name if name == backported => backports == Backports::Added,
            name => name == updates || name == security,
        };
        let suites: Vec<String> = source.suites.iter().filter(wanted).cloned().collect();
        if !suites.is_empty() {
            text += &source.with(suites).paragraph();
        }
    }
    if backports == Backports::Added && !sources.iter().any(|source| source.has(&backported)) {
        text += &main.with(vec![backported]).paragraph();
    }
    Some(text)
}

impl Source {
    fn has(&self, suite: &str) -> bool {
        self.suites.iter().any(|one| one == suite)
    }

    fn shares_place(&self, other: &Self) -> bool {
        let place = |uri: &str| uri.trim_end_matches('/').to_owned();
        self.uris
            .iter()
            .any(|uri| other.uris.iter().any(|theirs| place(uri) == place(theirs)))
    }

    fn with(&self, suites: Vec<String>) -> Self {
        Self {
            suites,
            ..self.clone()
        }
    }

    fn paragraph(&self) -> String {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n",
            self.uris.join(" "),
            self.suites.join(" ")
        );
        for (name, value) in &self.options {
            text += &format!("{name}: {value}\n");
        }
        text + "\n"
    }
}

/// `deb [signed-by=K] URI SUITE COMPONENT...`
fn one_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim().strip_prefix("deb")?;
    let line = line.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match line.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", line),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    let options = options
        .split_whitespace()
        .filter_map(|option| option.split_once('='));
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        options: kept(options),
    })
    .filter(|source| source.components.iter().any(|component| component == "main"))
}

fn deb822(fields: &BTreeMap<String, String>) -> Option<Source> {
    let words = |name: &str| -> Option<Vec<String>> {
        Some(fields.get(name)?.split_whitespace().map(str::to_owned).collect())
    };
    let enabled = fields
        .get("enabled")
        .is_none_or(|value| !matches!(value.trim(), "no" | "false"));
    let source = Source {
        uris: words("uris")?,
        suites: words("suites")?,
        components: words("components")?,
        options: kept(fields.iter().map(|(name, value)| (name.as_str(), value.as_str()))),
    };
    let binary = words("types")?.iter().any(|kind| kind == "deb");
    let main = source.components.iter().any(|component| component == "main");
    (enabled && binary && main).then_some(source)
}

/// Options that matter for fetching: who signs, and what of the checks is waived, as snapshots need it.
const KEPT: [&str; 7] = [
    "Signed-By",
    "Trusted",
    "Check-Valid-Until",
    "Check-Date",
    "Allow-Insecure",
    "Allow-Weak",
    "Allow-Downgrade-To-Insecure",
];

fn kept<'a>(options: impl Iterator<Item = (&'a str, &'a str)>) -> BTreeMap<String, String> {
    options
        .filter_map(|(name, value)| {
            let known = KEPT.iter().find(|known| known.eq_ignore_ascii_case(name))?;
            Some(((*known).to_owned(), value.to_owned()))
        })
        .collect()
}

/// Paragraphs of fields; a line that starts with a blank continues the field before it.
fn paragraphs(text: &str) -> Vec<BTreeMap<String, String>> {
    let mut all = vec![BTreeMap::new()];
    let mut field: Option<String> = None;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let paragraph = all.last_mut().expect("there is always a last paragraph");
        if line.trim().is_empty() {
            field = None;
            all.push(BTreeMap::new());
        } else if line.starts_with([' ', '\t']) {
            if let Some(value) = field.as_ref().and_then(|name| paragraph.get_mut(name)) {
                *value = format!("{value}\n{line}");
            }
        } else if let Some((name, value)) = line.split_once(':') {
            let name = name.trim().to_ascii_lowercase();
            paragraph.insert(name.clone(), value.trim().to_owned());
            field = Some(name);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_give_the_same_source() {
        let line =
            one_line("deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main contrib # x");
        let text = "# c\nTypes: deb deb-src\nURIs: http://mirror/debian\nSuites: bookworm\nComponents: main contrib\n\
                    Signed-By: /k.gpg\n";
        assert_eq!(line, deb822(&paragraphs(text)[0]));
        assert!(line.is_some());
        assert_eq!(one_line("deb-src http://mirror/debian bookworm main"), None);
        assert_eq!(one_line("# deb http://mirror/debian bookworm main"), None);
        assert_eq!(one_line("deb http://vendor/apt stable-thing extra"), None);
    }

    #[test]
    fn a_snapshot_may_be_as_old_there_as_here() {
        let line = one_line("deb [check-valid-until=no] http://snapshot/debian bookworm main").unwrap();
        let text = for_release(&[line], "bookworm", Backports::Added).unwrap();
        assert_eq!(text.matches("Check-Valid-Until: no\n").count(), 2, "{text}");
    }

    #[test]
    fn backports_come_from_the_place_of_the_main_suite() {
        let sources = [
            one_line("deb http://mirror/debian bookworm main").unwrap(),
            one_line("deb http://mirror/security bookworm-security main").unwrap(),
            one_line("deb http://vendor/x other main").unwrap(),
        ];
        let text = for_release(&sources, "bookworm", Backports::Added).unwrap();
        assert!(
            text.contains("URIs: http://mirror/debian\nSuites: bookworm-backports\n"),
            "{text}"
        );
        assert!(text.contains("Suites: bookworm-security"));
        assert!(!text.contains("vendor"));
        let own = for_release(&sources, "bookworm", Backports::LeftOut).unwrap();
        assert!(
            own.contains("Suites: bookworm\n") && !own.contains("backports"),
            "{own}"
        );
        assert_eq!(for_release(&sources, "trixie", Backports::LeftOut), None);
    }

    #[test]
    fn a_vendor_s_suite_of_the_release_s_name_is_not_debian_s() {
        let vendor = one_line("deb http://a-vendor/deb bookworm main").unwrap();
        let pgdg = one_line("deb http://a-vendor/pg bookworm-pgdg main").unwrap();
        let debian = one_line("deb http://mirror/debian bookworm main").unwrap();
        let updates = one_line("deb http://mirror/debian/ bookworm-updates main").unwrap();
        let listed = one_line("deb http://other/debian bookworm-backports main").unwrap();
        let mut sources = vec![vendor, pgdg, debian, updates];
        let text = for_release(&sources, "bookworm", Backports::Added).unwrap();
        assert!(!text.contains("vendor"), "{text}");
        let added = "URIs: http://mirror/debian\nSuites: bookworm-backports\n";
        assert!(text.contains(added), "{text}");
        // Those that the machine has are taken from where it has them, and once.
        sources.push(listed);
        let text = for_release(&sources, "bookworm", Backports::Added).unwrap();
        let kept = "URIs: http://other/debian\nSuites: bookworm-backports\n";
        assert!(text.contains(kept) && !text.contains(added), "{text}");
        let own = for_release(&sources, "bookworm", Backports::LeftOut).unwrap();
        assert!(
            own.contains("Suites: bookworm\n") && !own.contains("backports"),
            "{own}"
        );
    }

    #[test]
    fn a_disabled_source_is_left_out_and_an_inline_key_is_kept() {
        let text = "Types: deb\nURIs: http://m\nSuites: s\nComponents: main\nEnabled: no\n\n\
                    Types: deb\nURIs: http://m\nSuites: s\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let all: Vec<_> = paragraphs(text).iter().filter_map(deb822).collect();
        assert_eq!(all.len(), 1);
        assert!(
            all[0]
                .paragraph()
                .contains("Signed-By: \n -----BEGIN\n .\n abc\n")
        );
    }
}
