//! The device-specific configuration: what the driver writes goes to the back end and to its
//! successors, and what the back end says of it goes to the driver.

use super::device_type::DeviceType;
use super::mailbox::{ConfigWrite, MAX_CONFIG_WRITES};
use super::offer;
use super::worker::Worker;
use crate::frontend::{Error, Session};

/// What the driver wrote and reads there. It holds until the driver or the back end changes it, a
/// cache mode (virtio 1.3, 5.2.5) for one, whoever serves the device.
#[derive(Default)]
pub(super) struct Written(Vec<Kept>);

struct Kept {
    write: ConfigWrite,
    /// A back end has shown that it took it.
    taken: bool,
}

impl Written {
    /// Keeps a write of which no back end has shown yet what it made of it.
    fn keep(&mut self, write: ConfigWrite) {
        let new = write.range();
        self.0.retain(|old| {
            let old = old.write.range();
            old.start < new.start || old.end > new.end
        });
        if self.0.len() == MAX_CONFIG_WRITES {
            self.0.remove(0);
        }
        self.0.push(Kept { write, taken: false });
    }

    /// Forgets what a back end that was told of all shows otherwise.
    pub(super) fn settle(&mut self, config: &[u8]) {
        self.0
            .retain(|kept| config.get(kept.write.range()) == Some(&kept.write.data));
        self.0.iter_mut().for_each(|kept| kept.taken = true);
    }

    /// The driver's reset, or a successor that was lost as it was told: the driver reads from now on what
    /// back ends have shown.
    pub(super) fn forget_untaken(&mut self) {
        self.0.retain(|kept| kept.taken);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Does to `config` what a successor will do.
    fn foresee(&self, kind: DeviceType, config: &mut [u8]) {
        self.0.iter().for_each(|kept| kind.foresee(&kept.write, config));
    }

    /// Tells a successor, which must take what its predecessor did. What else it refuses is forgotten.
    pub(super) fn replay(&mut self, session: &mut Session) -> Result<(), Error> {
        let mut at = 0;
        while let Some(Kept { write, taken }) = self.0.get(at) {
            match session.write_config(write.offset, &write.data) {
                Ok(()) => at += 1,
                Err(Error::Refused(_)) if !taken => drop(self.0.remove(at)),
                Err(Error::Refused(_)) => {
                    return Err(Error::Successor("it refuses what the driver has configured"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Worker {
    /// Passes on what the driver wrote, and corrects what it reads by what came of it. Where nobody
    /// can say what did, a successor is told.
    pub(super) fn write_config(&mut self, writes: Vec<ConfigWrite>) {
        if writes.is_empty() {
            return;
        }
        for write in writes {
            let sent = match &mut self.session {
                Some(session) if session.has_config() => session.write_config(write.offset, &write.data),
                _ => Err(Error::NoBackend),
            };
            if let Err(error @ Error::Refused(_)) = sent {
                tracing::debug!(%error, "configuration write refused");
                continue;
            }
            if self.keeps_writes() {
                self.written.keep(write);
            }
            match sent {
                Ok(()) | Err(Error::NoBackend) => {}
                Err(error) => self.lose(&error),
            }
        }
        let changed = self.refresh_config().unwrap_or_else(|| {
            let mut config = self.offer.config.clone();
            self.written.foresee(self.kind(), &mut config);
            self.transport.set_config(&config)
        });
        if changed {
            self.transport.config_changed();
        }
    }

    fn keeps_writes(&self) -> bool {
        self.offer.own_config && self.kind().keeps_writes()
    }

    fn kind(&self) -> DeviceType {
        DeviceType(self.context.spec.device_type)
    }

    pub(super) fn reread_config(&mut self) {
        if self.refresh_config().is_some() {
            self.transport.config_changed();
        }
    }

    /// Reads the back end's configuration again, and says whether the driver reads otherwise than before.
    /// `None`: it has none, or is lost.
    pub(super) fn refresh_config(&mut self) -> Option<bool> {
        let spec = self.context.spec.clone();
        match self.with_session(|s| offer::read_config(s, &spec)) {
            Ok(Some(base)) => {
                self.offer.config = offer::refresh(&self.offer, base, &self.context.spec);
                self.written.settle(&self.offer.config);
                Some(self.transport.set_config(&self.offer.config))
            }
            _ => None,
        }
    }
}
