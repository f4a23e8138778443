//! TLS for the server: a certificate from files, or one of its own that signs itself.
//!
//! Like containerd's, the server asks for no client certificate: what protects a stream is its URL. A certificate of our own is made at each start and
//! never written down; a kubelet does not check it.
use kernel::{Class, Fault, Result, ResultExt};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// How long a client may take for its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes done that wait for the server.
const READY: usize = 64;

/// The server's side of TLS.
#[derive(Clone)]
pub struct Tls(Arc<rustls::ServerConfig>);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// From PEM files.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Tls> {
        let read = |what: &str, path: &Path| format!("read the {what} of the streaming server from {}", path.display());
        let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let chain = chain.map_err(|e| Fault::invalid_argument(format!("{}: {e}", read("certificate", certificate))))?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|e| Fault::invalid_argument(format!("{}: {e}", read("key", key))))?;
        Tls::new(chain, key)
    }
    /// One of its own, for this address.
    pub fn self_signed(address: SocketAddr) -> Result<Tls> {
        let (certificate, key) = certificate(address.ip())?;
        Tls::new(vec![certificate.into()], PrivatePkcs8KeyDer::from(key).into())
    }
    fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Tls> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let build = || {
            let versions = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
            versions.with_no_client_auth().with_single_cert(chain, key)
        };
        let mut config = build().map_err(|e| Fault::invalid_argument(format!("certificate and key of the streaming server: {e}")))?;
        // SPDY and WebSocket begin with an upgrade, which HTTP/2 does not have.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Tls(Arc::new(config)))
    }
}

/// A listener whose connections have done their handshake. A slow client holds nobody up: each handshake is a task.
pub(crate) struct Listener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: std::io::Result<SocketAddr>,
    _accepting: crate::activity::Owned,
}

impl Listener {
    pub(crate) fn new(listener: TcpListener, tls: Tls) -> Listener {
        let (to, ready) = mpsc::channel(READY);
        let address = listener.local_addr();
        let acceptor = TlsAcceptor::from(tls.0);
        let accepting = async move {
            loop {
                let Ok((tcp, peer)) = listener.accept().await else {
                    // Out of descriptors, most likely: they come back.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let (to, acceptor) = (to.clone(), acceptor.clone());
                tokio::spawn(async move {
                    match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
                        Ok(Ok(stream)) => drop(to.send((stream, peer)).await),
                        Ok(Err(error)) => tracing::debug!(%error, %peer, "a TLS handshake failed"),
                        Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
                    }
                });
            }
        };
        Listener { ready, address, _accepting: crate::activity::Owned::spawn(accepting) }
    }
}

impl axum::serve::Listener for Listener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;
    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(one) => one,
            None => std::future::pending().await,
        }
    }
    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.address.as_ref().map(|a| *a).map_err(|e| std::io::Error::new(e.kind(), e.to_string()))
    }
}

/// A certificate (DER) for an address, good for ten years, and its key (PKCS #8).
fn certificate(address: IpAddr) -> Result<(Vec<u8>, Vec<u8>)> {
    let random = SystemRandom::new();
    let failed = |what: &str| Fault::internal(format!("make a certificate for the streaming server: {what}"));
    let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).map_err(|_| failed("no key"))?;
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.as_ref(), &random).map_err(|_| failed("no key pair"))?;
    let mut serial = [0; 16];
    ring::rand::SecureRandom::fill(&random, &mut serial).map_err(|_| failed("no random numbers"))?;
    serial[0] = serial[0] & 0x7f | 1;
    let unsigned = der::to_be_signed(&serial, address, pair.public_key().as_ref(), der::years()?);
    let signature = pair.sign(&random, &unsigned).map_err(|_| failed("no signature"))?;
    Ok((der::signed(unsigned, signature.as_ref()), key.as_ref().to_vec()))
}

/// As much of X.509 as one such certificate needs (RFC 5280).
mod der {
    use super::{Class, IpAddr, Result, ResultExt};
    use std::time::{SystemTime, UNIX_EPOCH};

    const INTEGER: u8 = 0x02;
    const BITS: u8 = 0x03;
    const OCTETS: u8 = 0x04;
    const UTF8: u8 = 0x0c;
    const TIME: u8 = 0x18;
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    /// ecdsa-with-SHA256
    const ECDSA_SHA256: &[u8] = &[0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
    /// id-ecPublicKey, prime256v1
    const P256: &[u8] = &[0x06, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
    const COMMON_NAME: &[u8] = &[0x06, 3, 0x55, 4, 3];
    const SUBJECT_ALT_NAME: &[u8] = &[0x06, 3, 0x55, 0x1d, 17];

    fn tagged(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let body = parts.concat();
        let mut out = vec![tag];
        match body.len() {
            n @ 0..=127 => out.push(n as u8),
            n @ 128..=255 => out.extend([0x81, n as u8]),
            n => out.extend([0x82, (n >> 8) as u8, n as u8]),
        }
        out.extend(body);
        out
    }

    /// This year and the tenth after it.
    pub(super) fn years() -> Result<(u64, u64)> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).class(Class::Internal, "the clock")?;
        let year = 1970 + now.as_secs() / 31_556_952;
        Ok((year, year + 10))
    }

    pub(super) fn to_be_signed(serial: &[u8], address: IpAddr, key: &[u8], (from, to): (u64, u64)) -> Vec<u8> {
        let name = tagged(SEQUENCE, &[&tagged(SET, &[&tagged(SEQUENCE, &[COMMON_NAME, &tagged(UTF8, &[b"troupe streaming"])])])]);
        let time = |year: u64| tagged(TIME, &[format!("{year:04}0101000000Z").as_bytes()]);
        let address = match address {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        };
        let names = tagged(SEQUENCE, &[&tagged(0x82, &[b"localhost"]), &tagged(0x87, &[&address])]);
        let extension = tagged(SEQUENCE, &[SUBJECT_ALT_NAME, &tagged(OCTETS, &[&names])]);
        tagged(
            SEQUENCE,
            &[
                // Version 3.
                &tagged(0xa0, &[&tagged(INTEGER, &[&[2]])]),
                &tagged(INTEGER, &[serial]),
                &tagged(SEQUENCE, &[ECDSA_SHA256]),
                &name,
                &tagged(SEQUENCE, &[&time(from), &time(to)]),
                &name,
                &tagged(SEQUENCE, &[&tagged(SEQUENCE, &[P256]), &tagged(BITS, &[&[0], key])]),
                &tagged(0xa3, &[&tagged(SEQUENCE, &[&extension])]),
            ],
        )
    }

    pub(super) fn signed(unsigned: Vec<u8>, signature: &[u8]) -> Vec<u8> {
        tagged(SEQUENCE, &[&unsigned, &tagged(SEQUENCE, &[ECDSA_SHA256]), &tagged(BITS, &[&[0], signature])])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};

    #[test]
    fn a_certificate_of_its_own_is_good_for_its_address() {
        let address: IpAddr = "127.0.0.1".parse().unwrap();
        let der = CertificateDer::from(certificate(address).unwrap().0);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(der.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        for name in ["127.0.0.1", "localhost"] {
            let name = ServerName::try_from(name).unwrap();
            verifier.verify_server_cert(&der, &[], &name, &[], UnixTime::now()).unwrap();
        }
        let other = ServerName::try_from("10.0.0.1").unwrap();
        assert!(verifier.verify_server_cert(&der, &[], &other, &[], UnixTime::now()).is_err());
    }
}
