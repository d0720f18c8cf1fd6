//! `bulkhead metrics VM [DEVICE]`: what a running VM's device processes count, in Prometheus' text format.
//!
//! A process that its guest has broken into may say anything: only what is a metric is passed on.

use super::connection::Connection;
use super::orders;
use super::{print, ps, say};
use crate::failure::Failure;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use vm_spec::client::LAST_LINE;

/// What begins every name.
const PREFIX: &str = "bulkhead_";
const KINDS: [&str; 3] = ["counter", "gauge", "histogram"];

/// Of one device, or of all that have a process of ours; each sample says whose it is. The exit code: one that tells
/// nothing does not keep the others' from being printed.
///
/// # Errors
/// A [`Failure`] when no such VM or device runs, or none tells what it counts.
pub(super) fn show(vm: &str, device: Option<&str>) -> Result<u8, Failure> {
    let running = ps::find(vm)?;
    let devices: Vec<&str> = match device {
        Some(device) => running.role_of(device).map(|_| vec![device])?,
        None => running.devices().collect(),
    };
    let mut connection = Connection::open(&running)?;
    let (all, mut failures) = collect(vm, &devices, |device| {
        orders::order(&mut connection, device, "metrics".to_owned())
    });
    let last = failures.pop();
    for failure in &failures {
        say(format_args!("{failure}"));
    }
    match last {
        Some(failure) if failures.len() + 1 == devices.len() => Err(failure),
        last => {
            print(&all.text())?;
            last.map_or(Ok(0), Err)
        }
    }
}

/// What all devices say, and of those that say nothing of use why.
fn collect(
    vm: &str,
    devices: &[&str],
    mut ask: impl FnMut(&str) -> Result<String, Failure>,
) -> (Families, Vec<Failure>) {
    let mut all = Families::default();
    let mut failures = Vec::new();
    for device in devices {
        match ask(device).and_then(|said| all.with(&said, vm, device)) {
            Ok(more) => all = more,
            Err(failure) => failures.push(failure),
        }
    }
    (all, failures)
}

/// Samples by the metric that they belong to: the format wants those of one together.
#[derive(Clone, Default)]
struct Families(BTreeMap<String, Family>);

#[derive(Clone)]
struct Family {
    kind: String,
    samples: String,
}

impl Families {
    /// These and what a device's process said.
    fn with(&self, said: &str, vm: &str, device: &str) -> Result<Self, Failure> {
        let mut more = self.clone();
        let added = more.add(said, vm, device);
        added.map(|()| more).ok_or_else(|| {
            Failure::host(format!("the process of {device} does not tell what it counts"))
                .cause("it says what is no metric")
        })
    }

    /// Adds what a device's process said; `None`: it is none of this, of which some may have been added. What another
    /// device's process has declared to be of another kind is left out.
    fn add(&mut self, said: &str, vm: &str, device: &str) -> Option<()> {
        let mut declared_here = BTreeSet::new();
        let mut family = None;
        for line in said.lines().take_while(|line| *line != LAST_LINE) {
            if let Some(declared) = line.strip_prefix("# TYPE ") {
                let (name, kind) = declared.split_once(' ')?;
                if !is_name(name) || !KINDS.contains(&kind) || !declared_here.insert(name) {
                    return None;
                }
                let new = || Family {
                    kind: kind.to_owned(),
                    samples: String::new(),
                };
                let known = self.0.entry(name.to_owned()).or_insert_with(new);
                family = Some((name, kind, Some(known).filter(|known| known.kind == kind)));
            } else {
                let (family_name, kind, family) = family.as_mut()?;
                let Sample { name, labels, value } = Sample::parse(line)?;
                let parts: &[&str] = match *kind {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                if !parts.contains(&name.strip_prefix(*family_name)?) {
                    return None;
                }
                let Some(family) = family else { continue };
                let comma = if labels.is_empty() { "" } else { "," };
                // Writing to a String cannot fail.
                let _ = writeln!(
                    family.samples,
                    "{name}{{vm=\"{vm}\",device=\"{device}\"{comma}{labels}}} {value}"
                );
            }
        }
        Some(())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (name, Family { kind, samples }) in &self.0 {
            let _ = write!(text, "# TYPE {name} {kind}\n{samples}");
        }
        text + LAST_LINE + "\n"
    }
}

/// `NAME VALUE` or `NAME{LABELS} VALUE`.
struct Sample<'a> {
    name: &'a str,
    labels: &'a str,
    value: &'a str,
}

impl<'a> Sample<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}')?),
            None => (series, ""),
        };
        let sound =
            is_name(name) && (labels.is_empty() || are_labels(labels)) && value.parse::<f64>().is_ok();
        sound.then_some(Self { name, labels, value })
    }
}

/// `NAME="VALUE"` with commas between, each name once and none of ours.
fn are_labels(mut text: &str) -> bool {
    let mut names = BTreeSet::from(["vm", "device"]);
    loop {
        let Some((name, rest)) = text.split_once("=\"") else {
            return false;
        };
        let Some((value, rest)) = quoted(rest) else {
            return false;
        };
        let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        // The bound of a histogram's bucket.
        let is_value = name != "le" || value.parse::<f64>().is_ok();
        if !is_name || !is_value || !names.insert(name) {
            return false;
        }
        match rest.strip_prefix(',') {
            Some(more) => text = more,
            None => return rest.is_empty(),
        }
    }
}

/// A label's value, which only escapes what the format has escapes for, and what follows its quotation mark.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'\\' | b'"' | b'n' if escaped => escaped = false,
            _ if escaped => return None,
            b'\\' => escaped = true,
            b'"' => return Some((&text[..at], &text[at + 1..])),
            byte if byte.is_ascii_graphic() || byte == b' ' => {}
            _ => return None,
        }
    }
    None
}

fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_metric_stand_together_and_say_whose_they_are() {
        let mut all = Families::default();
        let disk = "# TYPE bulkhead_blk_size gauge\nbulkhead_blk_size 7\n# TYPE bulkhead_blk_ops_total counter\n\
                    bulkhead_blk_ops_total{queue=\"0\",op=\"read\"} 3\n# EOF\n";
        all.add(disk, "web", "disk0").unwrap();
        all.add(disk, "web", "disk1").unwrap();
        let expected = "# TYPE bulkhead_blk_ops_total counter\n\
                        bulkhead_blk_ops_total{vm=\"web\",device=\"disk0\",queue=\"0\",op=\"read\"} 3\n\
                        bulkhead_blk_ops_total{vm=\"web\",device=\"disk1\",queue=\"0\",op=\"read\"} 3\n\
                        # TYPE bulkhead_blk_size gauge\n\
                        bulkhead_blk_size{vm=\"web\",device=\"disk0\"} 7\n\
                        bulkhead_blk_size{vm=\"web\",device=\"disk1\"} 7\n\
                        # EOF\n";
        assert_eq!(all.text(), expected);
    }

    #[test]
    fn one_that_tells_nothing_hides_no_other() {
        let (all, failures) = collect(
            "web",
            &["disk0", "disk1", "disk2", "net0"],
            |device| match device {
                "disk0" => Err(Failure::host("it is lost")),
                "disk1" => Ok("# TYPE bulkhead_a gauge\nbulkhead_a 1\nwhatever\n# EOF\n".to_owned()),
                "disk2" => {
                    Ok("# TYPE bulkhead_a gauge\nbulkhead_a 2\n# TYPE bulkhead_b gauge\n# EOF\n".to_owned())
                }
                // Another says that this is something else.
                "net0" => Ok(
                    "# TYPE bulkhead_b counter\nbulkhead_b 1\n# TYPE bulkhead_a gauge\nbulkhead_a 2\n# EOF\n"
                        .to_owned(),
                ),
                _ => Ok("# TYPE bulkhead_a gauge\nbulkhead_a 2\n# EOF\n".to_owned()),
            },
        );
        let expected = "# TYPE bulkhead_a gauge\nbulkhead_a{vm=\"web\",device=\"disk2\"} 2\n\
                        bulkhead_a{vm=\"web\",device=\"net0\"} 2\n# TYPE bulkhead_b gauge\n# EOF\n";
        assert_eq!((all.text().as_str(), failures.len()), (expected, 2));
    }

    #[test]
    fn a_histogram_has_samples_of_longer_names() {
        let mut all = Families::default();
        let said =
            "# TYPE bulkhead_a histogram\nbulkhead_a_bucket{le=\"+Inf\"} 1\nbulkhead_a_sum 0.5\n# EOF\n";
        all.add(said, "web", "disk0").unwrap();
        assert!(
            all.text()
                .contains("bulkhead_a_sum{vm=\"web\",device=\"disk0\"} 0.5\n")
        );
    }

    #[test]
    fn what_is_no_metric_is_not_passed_on() {
        let sample = |line: &str| format!("# TYPE bulkhead_a gauge\n{line}\n# EOF\n");
        for said in [
            "bulkhead_a 1\n# EOF\n".to_owned(),
            "# TYPE bulkhead_a gouge\n# EOF\n".to_owned(),
            "# TYPE node_load1 gauge\n# EOF\n".to_owned(),
            "# TYPE bulkhead_a gauge\n# TYPE bulkhead_a counter\nbulkhead_a 1\n# EOF\n".to_owned(),
            "# HELP bulkhead_a x\n# EOF\n".to_owned(),
            sample("bulkhead_a one"),
            sample("bulkhead_a"),
            sample("bulkhead_b 1"),
            sample("bulkhead_a\u{1b}[2J 1"),
            sample("bulkhead_a{x=\"\u{1b}[2J\"} 1"),
            sample("bulkhead_a{x=\"1\"} 2{y=\"1\"} 3"),
            sample("bulkhead_a{x=\"1\" 1"),
            sample("bulkhead_a{x} 1"),
            sample("bulkhead_a{x=\"} 1"),
            sample("bulkhead_a{device=\"d\"} 1"),
            sample("bulkhead_a{x=\"1\",x=\"2\"} 1"),
            sample("bulkhead_a{x=\"1\",} 1"),
            sample("bulkhead_a{x=\"1\"y=\"2\"} 1"),
            sample("bulkhead_a{=\"1\"} 1"),
            sample("bulkhead_a{__name__=\"b\"} 1"),
            sample("bulkhead_a{x=\"\\t\"} 1"),
            sample("bulkhead_a{x=\"\\\"} 1"),
            sample("bulkhead_a{le=\"x\"} 1"),
            sample("bulkhead_ab 1"),
            sample("error: \u{1b}]0;x"),
        ] {
            assert!(
                Families::default().add(&said, "web", "disk0").is_none(),
                "{said:?}"
            );
        }
        let mut all = Families::default();
        for said in [
            "bulkhead_a{x=\"a b\"} 1e3",
            "bulkhead_a{x=\"\\\\\\\"\\n}\",y=\"\"} 1",
        ] {
            assert!(all.add(&sample(said), "web", "d").is_some(), "{said}");
        }
        // What follows the end is not looked at.
        assert!(all.add("# EOF\nwhatever\n", "web", "d").is_some());
    }
}
